"""The first schema: jobs, points, items, requests, choices, chunks, usage, scores, workers.

Written out in full and frozen: it must go on making the same tables whatever `tables.py` becomes.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "jobs",
    "points",
    "items",
    "requests",
    "choices",
    "chunks",
    "usage",
    "scores",
    "workers",
)


def upgrade() -> None:
    _jobs()
    _points_and_items()
    _requests()
    _choices_and_chunks()
    _usage_and_scores()
    _workers()
    op.execute(_JOB_STATUS)
    op.execute(_request_text())


def downgrade() -> None:
    op.execute("DROP VIEW request_text")
    op.execute("DROP VIEW job_status")
    for table in reversed(TABLES):
        op.drop_table(table)


def _sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _big() -> sa.types.TypeEngine[int]:
    return sa.Integer() if _sqlite() else sa.BigInteger()


def _time(name: str, *, given: bool = False) -> sa.Column[object]:
    clock = "(strftime('%Y-%m-%d %H:%M:%f', 'now'))" if _sqlite() else "clock_timestamp()"
    default = sa.text(clock) if given else None
    return sa.Column(name, sa.DateTime(timezone=True), nullable=not given, server_default=default)


def _parent(table: str, column: str, parent: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_{column}_{parent}"
    return sa.ForeignKeyConstraint([column], [f"{parent}.id"], name=name, ondelete="CASCADE")


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("number", _big(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("seed", _big(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("n_items", _big(), nullable=False),
        sa.Column("n_points", _big(), nullable=False),
        sa.Column("n_requests", _big(), nullable=False),
        sa.Column("n_choices", _big(), nullable=False),
        _time("created_at", given=True),
        _time("planned_at"),
        _time("paused_at"),
        _time("cancelled_at"),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("number", name="uq_jobs_number"),
    )
    op.create_index("ix_jobs_name_number", "jobs", ["name", "number"])
    op.create_index("ix_jobs_model_priority_number", "jobs", ["model", "priority", "number"])


def _points_and_items() -> None:
    op.create_table(
        "points",
        sa.Column("id", _big(), nullable=False, autoincrement=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_points"),
        sa.UniqueConstraint("job_id", "position", name="uq_points_job_id_position"),
        _parent("points", "job_id", "jobs"),
    )
    op.create_table(
        "items",
        sa.Column("id", _big(), nullable=False, autoincrement=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("columns", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_items"),
        sa.UniqueConstraint("job_id", "position", name="uq_items_job_id_position"),
        sa.UniqueConstraint("job_id", "custom_id", name="uq_items_job_id_custom_id"),
        _parent("items", "job_id", "jobs"),
    )


def _requests() -> None:
    op.create_table(
        "requests",
        sa.Column("id", _big(), nullable=False, autoincrement=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("item_id", _big(), nullable=False),
        sa.Column("point_id", _big(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, server_default="queued"),
        sa.Column("epoch", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("seed", _big(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("idle_attempts", sa.Integer(), nullable=False, server_default="0"),
        _time("leased_until"),
        sa.Column("worker_id", sa.String(200)),
        sa.Column("error_code", sa.String(64)),
        sa.Column("error_message", sa.Text()),
        sa.Column("system_fingerprint", sa.String(200)),
        _time("created_at", given=True),
        _time("started_at"),
        _time("finished_at"),
        sa.PrimaryKeyConstraint("id", name="pk_requests"),
        _parent("requests", "job_id", "jobs"),
        _parent("requests", "item_id", "items"),
        _parent("requests", "point_id", "points"),
    )
    op.create_index("ix_requests_job_id_state_id", "requests", ["job_id", "state", "id"])
    op.create_index("ix_requests_item_id", "requests", ["item_id"])
    op.create_index("ix_requests_point_id", "requests", ["point_id"])
    running = sa.text("state = 'running'")
    op.create_index(
        "ix_requests_leased_until",
        "requests",
        ["leased_until"],
        sqlite_where=running,
        postgresql_where=running,
    )


def _choices_and_chunks() -> None:
    op.create_table(
        "choices",
        sa.Column("request_id", _big(), nullable=False, autoincrement=False),
        sa.Column("choice", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("finish_reason", sa.String(32)),
        sa.Column("text", sa.Text()),
        sa.PrimaryKeyConstraint("request_id", "choice", name="pk_choices"),
        _parent("choices", "request_id", "requests"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "chunks",
        sa.Column("request_id", _big(), nullable=False, autoincrement=False),
        sa.Column("choice", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("token_start", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("logprobs", sa.JSON()),
        _time("created_at", given=True),
        sa.PrimaryKeyConstraint("request_id", "choice", "token_start", name="pk_chunks"),
        _parent("chunks", "request_id", "requests"),
        sqlite_with_rowid=False,
    )


def _usage_and_scores() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", _big(), nullable=False, autoincrement=False),
        sa.Column("attempt", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("cached_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("replayed_tokens", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(200)),
        sa.PrimaryKeyConstraint("request_id", "attempt", name="pk_usage"),
        _parent("usage", "request_id", "requests"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "scores",
        sa.Column("request_id", _big(), nullable=False, autoincrement=False),
        sa.Column("choice", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("grader", sa.String(200), nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.Column("detail", sa.Text()),
        sa.PrimaryKeyConstraint("request_id", "choice", "grader", name="pk_scores"),
        _parent("scores", "request_id", "requests"),
        sqlite_with_rowid=False,
    )


def _workers() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.String(200), nullable=False),
        sa.Column("hostname", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        _time("started_at", given=True),
        _time("seen_at", given=True),
        _time("stopped_at"),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )


# A request's prompt counts once, however many attempts prefilled it.
_JOB_STATUS = """
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
    CASE WHEN c.queued + c.running = 0 THEN c.last_finished_at END AS finished_at
FROM (
    SELECT j.id, j.number, j.name, j.model, j.paused_at, j.cancelled_at, j.created_at,
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


def _request_text() -> str:
    # SQLite before 3.44 has no ORDER BY in aggregates; its group_concat takes the rows as the
    # inner query yields them.
    joined = "string_agg(k.text, '' ORDER BY k.token_start) FROM chunks AS k"
    if _sqlite():
        joined = (
            "group_concat(k.text, '') FROM (SELECT text FROM chunks AS i"
            " WHERE i.request_id = c.request_id AND i.choice = c.choice"
            " ORDER BY i.token_start) AS k"
        )
    mine = "" if _sqlite() else "WHERE k.request_id = c.request_id AND k.choice = c.choice"
    return f"""
CREATE VIEW request_text AS
SELECT r.id AS request_id, r.job_id, j.name AS job_name,
    i.position AS item_position, p.position AS point_position, i.custom_id,
    c.choice, r.state, c.n_tokens, c.finish_reason,
    coalesce((SELECT {joined} {mine}), '') AS text
FROM requests AS r
JOIN jobs AS j ON j.id = r.job_id
JOIN items AS i ON i.id = r.item_id
JOIN points AS p ON p.id = r.point_id
JOIN choices AS c ON c.request_id = r.id
WHERE j.planned_at IS NOT NULL
"""  # noqa: S608
