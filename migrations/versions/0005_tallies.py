"""Requests by state and tokens of a job, kept by triggers: its status costs the same at any size.

Written out in full and frozen, as every migration. Triggers, so that whoever writes is counted,
a person's SQL too. On PostgreSQL each statement adds rows of its own, and no two transactions wait
for each other; on SQLite, which has one writer, each row adds to the row of these ten seconds. A
later migration that makes `requests`, `usage` or `jobs` anew on SQLite must make their triggers
again.
"""

# ruff: noqa: S608 - every word of the SQL stands in this file

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STATES = ("queued", "running", "succeeded", "failed", "cancelled")
COUNTS = ("requests", *STATES)
TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens", "replayed_tokens")
ONCE = ("prompt_tokens", "cached_tokens")  # the most of a request's attempts; of the others the sum
ERROR, ENDED, FINISHED = (
    f"{name} IS NOT NULL" for name in ("error_code", "finished_at", "finish_reason")
)


def upgrade() -> None:
    _tallies()
    _indexes()
    op.execute(_FILL)
    for words in _sqlite_triggers() if _sqlite() else _postgresql_triggers():
        op.execute(words)
    other = _drop_views()
    op.execute(_JOB_STATUS)
    if other:
        op.execute(other)


def downgrade() -> None:
    for table, names in _TRIGGERS.items():
        for name in names:
            op.execute(f"DROP TRIGGER {name}" + ("" if _sqlite() else f" ON {table}"))
    if not _sqlite():
        for table in _TRIGGERS:
            op.execute(f"DROP FUNCTION tally_{table}()")
    other = _drop_views()
    op.drop_table("tallies")
    op.drop_index("ix_choices_finish_reason", table_name="choices")
    op.drop_index("ix_requests_finished_at", table_name="requests")
    op.drop_index("ix_requests_error_code", table_name="requests")
    op.drop_index("ix_requests_point_id", table_name="requests")
    op.create_index("ix_requests_point_id", "requests", ["point_id"])
    op.execute(_OLD_JOB_STATUS)
    if other:
        op.execute(other)


_TRIGGERS = {
    "requests": ("tally_requests_insert", "tally_requests_update", "tally_requests_delete"),
    "usage": ("tally_usage_insert", "tally_usage_update", "tally_usage_delete"),
    "jobs": ("tally_jobs_insert", "tally_jobs_delete"),
}


def _sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _big() -> sa.types.TypeEngine[int]:
    return sa.Integer() if _sqlite() else sa.BigInteger()


def _drop_views() -> str | None:
    """Drop the view on what changes; how to make the other one again, where it had to go too."""
    op.execute("DROP VIEW job_status")
    if not _sqlite():
        return None
    made = sa.text("SELECT sql FROM sqlite_master WHERE name = 'request_text'")
    other: str | None = op.get_bind().scalar(made)
    op.execute("DROP VIEW request_text")
    return other


def _tallies() -> None:
    op.create_table(
        "tallies",
        sa.Column("id", _big(), nullable=False),
        sa.Column("number", _big(), nullable=False),
        *(
            sa.Column(name, _big(), nullable=False, server_default="0")
            for name in ("second", *COUNTS, *TOKENS)
        ),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_tallies"),
    )
    op.create_index("ix_tallies_number_second", "tallies", ["number", "second"])
    op.create_index("ix_tallies_second_number", "tallies", ["second", "number"])


def _indexes() -> None:
    op.drop_index("ix_requests_point_id", table_name="requests")
    op.create_index("ix_requests_point_id", "requests", ["point_id", "id"])
    for name, table, columns, where in (
        ("error_code", "requests", ["job_id", "error_code", "id"], ERROR),
        ("finished_at", "requests", ["job_id", "finished_at", "id"], ENDED),
        ("finish_reason", "choices", ["finish_reason", "request_id"], FINISHED),
    ):
        words = sa.text(where)
        op.create_index(
            f"ix_{table}_{name}", table, columns, sqlite_where=words, postgresql_where=words
        )


_FILL = f"""
INSERT INTO tallies (number, {", ".join(COUNTS)}, {", ".join(TOKENS)}, started_at)
SELECT r.number, r.requests, {", ".join(f"r.{state}" for state in STATES)},
    coalesce(u.prompt_tokens, 0), coalesce(u.cached_tokens, 0),
    coalesce(u.completion_tokens, 0), coalesce(u.replayed_tokens, 0), r.started_at
FROM (
    SELECT id / 1000000000 AS number, count(*) AS requests, min(started_at) AS started_at,
        {", ".join(f"sum(CASE WHEN state = '{s}' THEN 1 ELSE 0 END) AS {s}" for s in STATES)}
    FROM requests
    GROUP BY 1
) AS r
LEFT JOIN (
    SELECT request_id / 1000000000 AS number, {", ".join(f"sum({t}) AS {t}" for t in TOKENS)}
    FROM (
        SELECT request_id, max(prompt_tokens) AS prompt_tokens, max(cached_tokens) AS cached_tokens,
            sum(completion_tokens) AS completion_tokens, sum(replayed_tokens) AS replayed_tokens
        FROM usage
        GROUP BY request_id
    ) AS p
    GROUP BY 1
) AS u ON u.number = r.number
"""


def _postgresql_triggers() -> list[str]:
    """One function a table; each asks which rows there are before it names them."""
    clock = "floor(extract(epoch FROM clock_timestamp()) / 10)::bigint * 10"
    new = "SELECT {columns}, 1 AS d FROM new_rows"
    old = "SELECT {columns}, -1 AS d FROM old_rows"
    both = f"{new} UNION ALL {old}"
    # What goes with its job need not be counted down: its tallies go too.
    known = " WHERE EXISTS (SELECT FROM jobs AS j WHERE j.number = c.{id} / 1000000000)"
    states = ", ".join(f"coalesce(sum(c.d) FILTER (WHERE c.state = '{s}'), 0)" for s in STATES)
    requests = (
        f"INSERT INTO tallies (number, second, {', '.join(COUNTS)}, started_at)"
        f" SELECT c.id / 1000000000, {clock}, sum(c.d), {states},"
        " min(c.started_at) FILTER (WHERE c.d = 1)"
        " FROM ({rows}) AS c{where} GROUP BY 1"
        # A renewed lease changes nothing here.
        " HAVING sum(c.d) <> 0 OR "
        + " OR ".join(f"sum(c.d) FILTER (WHERE c.state = '{s}') <> 0" for s in STATES)
    )
    most = ", ".join(f"max({t}) FILTER (WHERE d = {d}) AS {n}_{t}" for t in ONCE for n, d in _SIDES)
    usage = (
        f"INSERT INTO tallies (number, second, {', '.join(TOKENS)})"
        f" SELECT c.request_id / 1000000000, {clock}, "
        + ", ".join(f"sum(greatest(c.new_{t}, o.{t}) - greatest(c.old_{t}, o.{t}))" for t in ONCE)
        + ", sum(c.completion_tokens), sum(c.replayed_tokens) FROM ("
        f"SELECT request_id, {most}, sum(d * completion_tokens) AS completion_tokens,"
        " sum(d * replayed_tokens) AS replayed_tokens,"
        " coalesce(array_agg(attempt) FILTER (WHERE d = 1), '{{}}') AS attempts"
        " FROM ({rows}) AS r GROUP BY request_id) AS c CROSS JOIN LATERAL ("
        "SELECT coalesce(max(u.prompt_tokens), 0) AS prompt_tokens,"
        " coalesce(max(u.cached_tokens), 0) AS cached_tokens FROM usage AS u"
        " WHERE u.request_id = c.request_id AND u.attempt <> ALL (c.attempts)) AS o"
        "{where} GROUP BY 1"
    )
    made: list[str] = []
    for table, words, columns in (
        ("requests", requests, ("id", "state", "started_at")),
        ("usage", usage, ("request_id", "attempt", *TOKENS)),
    ):
        listed = ", ".join(columns)
        inserted, updated, deleted = (
            words.format(rows=rows.format(columns=listed), where=where)
            for rows, where in ((new, ""), (both, ""), (old, known.format(id=columns[0])))
        )
        body = (
            f"IF TG_OP = 'INSERT' THEN {inserted};"
            f" ELSIF TG_OP = 'UPDATE' THEN {updated};"
            f" ELSIF EXISTS (SELECT FROM old_rows) THEN {deleted}; END IF;"
        )
        made += [_function(table, body)]
        for operation, rows in (
            ("INSERT", "NEW TABLE AS new_rows"),
            ("UPDATE", "OLD TABLE AS old_rows NEW TABLE AS new_rows"),
            ("DELETE", "OLD TABLE AS old_rows"),
        ):
            made += [
                f"CREATE TRIGGER tally_{table}_{operation.lower()} AFTER {operation} ON {table}"
                f" REFERENCING {rows} FOR EACH STATEMENT EXECUTE FUNCTION tally_{table}()"
            ]
    gone = "DELETE FROM tallies WHERE number = coalesce(NEW.number, OLD.number);"
    made += [_function("jobs", gone)]
    for operation in ("INSERT", "DELETE"):
        made += [
            f"CREATE TRIGGER tally_jobs_{operation.lower()} AFTER {operation} ON jobs"
            " FOR EACH ROW EXECUTE FUNCTION tally_jobs()"
        ]
    return made


_SIDES = (("old", -1), ("new", 1))


def _function(table: str, body: str) -> str:
    return (
        f"CREATE FUNCTION tally_{table}() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN {body} RETURN NULL; END $$"
    )


def _sqlite_triggers() -> list[str]:
    """A row each: what it changes is added to its job's row of these ten seconds."""
    moved = {s: f"(NEW.state = '{s}') - (OLD.state = '{s}')" for s in STATES}
    come = {"requests": "1", **{s: f"(NEW.state = '{s}')" for s in STATES}}
    gone = {"requests": "-1", **{s: f"-(OLD.state = '{s}')" for s in STATES}}
    changed = " OR ".join(f"OLD.{t} <> NEW.{t}" for t in TOKENS)
    made = [
        _added("requests", "INSERT", "1", come, started="NEW.started_at"),
        _added(
            *("requests", "UPDATE OF state", "OLD.state <> NEW.state"),
            moved,
            started="NEW.started_at",
        ),
        _added("requests", "DELETE", _KNOWN.format(id="id"), gone),
        _added("usage", "INSERT", "1", {t: _spent(t, new=True) for t in TOKENS}),
        _added(
            *("usage", f"UPDATE OF {', '.join(TOKENS)}", changed),
            {t: _spent(t, old=True, new=True) for t in TOKENS},
        ),
        _added(
            *("usage", "DELETE", _KNOWN.format(id="request_id")),
            {t: _spent(t, old=True) for t in TOKENS},
        ),
    ]
    for operation, row in (("INSERT", "NEW"), ("DELETE", "OLD")):
        made += [
            f"CREATE TRIGGER tally_jobs_{operation.lower()} AFTER {operation} ON jobs BEGIN"
            f" DELETE FROM tallies WHERE number = {row}.number; END"
        ]
    return made


_KNOWN = "EXISTS (SELECT 1 FROM jobs WHERE number = OLD.{id} / 1000000000)"


def _added(
    table: str, operation: str, when: str, changes: dict[str, str], started: str | None = None
) -> str:
    event = operation.partition(" ")[0]
    row = "OLD" if event == "DELETE" else "NEW"
    number = f"{row}.{'id' if table == 'requests' else 'request_id'} / 1000000000"
    clock = "CAST(strftime('%s', 'now') AS INTEGER) / 10 * 10"
    sets = [f"{name} = {name} + ({words})" for name, words in changes.items()]
    names, values = [*changes], [*changes.values()]
    if started is not None:
        first = f"coalesce(min(started_at, {started}), started_at, {started})"
        sets, names, values = (
            [*sets, f"started_at = {first}"],
            [*names, "started_at"],
            [*values, started],
        )
    return (
        f"CREATE TRIGGER tally_{table}_{event.lower()} AFTER {operation} ON {table} WHEN {when}"
        f" BEGIN UPDATE tallies SET {', '.join(sets)}"
        f" WHERE number = {number} AND second = {clock};"
        f" INSERT INTO tallies (number, second, {', '.join(names)})"
        f" SELECT {number}, {clock}, {', '.join(values)} WHERE changes() = 0; END"
    )


def _spent(tokens: str, *, old: bool = False, new: bool = False) -> str:
    """By how much a row of usage changes its job's tokens."""
    if tokens not in ONCE:
        sides = [f"NEW.{tokens}"] * new + [f"-OLD.{tokens}"] * old
        return " ".join(sides)
    row = "NEW" if new else "OLD"
    others = (
        f"coalesce((SELECT max(u.{tokens}) FROM usage AS u"
        f" WHERE u.request_id = {row}.request_id AND u.attempt <> {row}.attempt), 0)"
    )
    after = f"max(NEW.{tokens}, {others})" if new else others
    before = f"max(OLD.{tokens}, {others})" if old else others
    same = f"NEW.{tokens} = OLD.{tokens}" if old and new else "0"
    return f"CASE WHEN {same} THEN 0 ELSE {after} - {before} END"


_JOB_STATUS = f"""
CREATE VIEW job_status AS
SELECT c.id, c.name, c.model,
    CASE
        WHEN c.paused_at IS NOT NULL AND c.queued + c.running > 0 THEN 'paused'
        WHEN c.cancelled_at IS NOT NULL AND c.running = 0 THEN 'cancelled'
        WHEN c.queued = c.requests THEN 'queued'
        WHEN c.queued + c.running > 0 THEN 'running'
        WHEN c.succeeded = c.requests THEN 'succeeded'
        WHEN c.failed = c.requests THEN 'failed'
        ELSE 'partial'
    END AS state,
    c.requests, c.queued, c.running, c.succeeded, c.failed, c.cancelled,
    c.prompt_tokens, c.completion_tokens, c.replayed_tokens, c.created_at,
    CASE WHEN c.queued + c.running = 0 THEN (
        SELECT max(r.finished_at) FROM requests AS r
        WHERE r.job_id = c.id AND r.finished_at IS NOT NULL
    ) END AS finished_at,
    c.cancel_reason, c.deadline_at, c.number, c.kind, c.owner, c.cached_tokens, c.started_at
FROM (
    SELECT j.id, j.number, j.name, j.model, j.kind, j.owner, j.paused_at, j.cancelled_at,
        j.created_at, j.cancel_reason, j.deadline_at,
        {", ".join(f"CAST(sum(t.{name}) AS BIGINT) AS {name}" for name in (*COUNTS, *TOKENS))},
        min(t.started_at) AS started_at
    FROM jobs AS j
    JOIN tallies AS t ON t.number = j.number
    WHERE j.planned_at IS NOT NULL
    GROUP BY j.id
) AS c
WHERE c.requests > 0
"""

_OLD_JOB_STATUS = """
CREATE VIEW job_status AS
SELECT c.id, c.name, c.model,
    CASE
        WHEN c.paused_at IS NOT NULL AND c.queued + c.running > 0 THEN 'paused'
        WHEN c.cancelled_at IS NOT NULL AND c.running = 0 THEN 'cancelled'
        WHEN c.queued = c.requests THEN 'queued'
        WHEN c.queued + c.running > 0 THEN 'running'
        WHEN c.succeeded = c.requests THEN 'succeeded'
        WHEN c.failed = c.requests THEN 'failed'
        ELSE 'partial'
    END AS state,
    c.requests, c.queued, c.running, c.succeeded, c.failed, c.cancelled,
    (
        SELECT coalesce(sum(p.prompt_tokens), 0)
        FROM (
            SELECT max(u.prompt_tokens) AS prompt_tokens
            FROM usage AS u
            WHERE u.request_id >= c.number * 1000000000
                AND u.request_id < (c.number + 1) * 1000000000
            GROUP BY u.request_id
        ) AS p
    ) AS prompt_tokens,
    (
        SELECT coalesce(sum(u.completion_tokens), 0)
        FROM usage AS u
        WHERE u.request_id >= c.number * 1000000000
            AND u.request_id < (c.number + 1) * 1000000000
    ) AS completion_tokens,
    (
        SELECT coalesce(sum(u.replayed_tokens), 0)
        FROM usage AS u
        WHERE u.request_id >= c.number * 1000000000
            AND u.request_id < (c.number + 1) * 1000000000
    ) AS replayed_tokens,
    c.created_at,
    CASE WHEN c.queued + c.running = 0 THEN c.last_finished_at END AS finished_at,
    c.cancel_reason, c.deadline_at
FROM (
    SELECT j.id, j.number, j.name, j.model, j.paused_at, j.cancelled_at, j.created_at,
        j.cancel_reason, j.deadline_at,
        count(*) AS requests,
        sum(CASE WHEN r.state = 'queued' THEN 1 ELSE 0 END) AS queued,
        sum(CASE WHEN r.state = 'running' THEN 1 ELSE 0 END) AS running,
        sum(CASE WHEN r.state = 'succeeded' THEN 1 ELSE 0 END) AS succeeded,
        sum(CASE WHEN r.state = 'failed' THEN 1 ELSE 0 END) AS failed,
        sum(CASE WHEN r.state = 'cancelled' THEN 1 ELSE 0 END) AS cancelled,
        max(r.finished_at) AS last_finished_at
    FROM jobs AS j
    JOIN requests AS r ON r.job_id = j.id
    WHERE j.planned_at IS NOT NULL
    GROUP BY j.id
) AS c
"""
