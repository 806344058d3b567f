"""What must hold in the database after any fault, by SQL that both databases understand.

`watch` puts triggers beside the tables, which note what no later look could see: an epoch or a
counter that fell, a chunk that was changed, an end that was taken back. Reads with connections of
its own and knows nothing of the product but its tables.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Engine, text

PER_JOB = 1_000_000_000
LAWS = {
    "chunks are contiguous from 0": """
        SELECT count(*) FROM (SELECT token_start, coalesce(lag(token_start + n_tokens) OVER
            (PARTITION BY request_id, choice ORDER BY token_start), 0) AS expected FROM chunks) k
        WHERE token_start <> expected""",
    "a choice counts its chunks' tokens": """
        SELECT count(*) FROM choices c WHERE n_tokens <> (SELECT coalesce(sum(k.n_tokens), 0)
            FROM chunks k WHERE k.request_id = c.request_id AND k.choice = c.choice)""",
    "a chunk holds four bytes a token": """
        SELECT count(*) FROM chunks WHERE length(token_ids) <> 4 * n_tokens""",
    "usage equals tokens": """
        SELECT count(*) FROM requests r WHERE
            (SELECT coalesce(sum(completion_tokens), 0) FROM usage u WHERE u.request_id = r.id) <>
            (SELECT sum(n_tokens) FROM choices c WHERE c.request_id = r.id)""",
    "every request is at its end": """
        SELECT count(*) FROM requests WHERE state NOT IN ('succeeded', 'failed', 'cancelled')""",
    "what is at its end has its time and no lease": """
        SELECT count(*) FROM requests WHERE state IN ('succeeded', 'failed', 'cancelled')
            AND (finished_at IS NULL OR leased_until IS NOT NULL)""",
    "every choice of a success has one end": """
        SELECT count(*) FROM choices c JOIN requests r ON r.id = c.request_id
        WHERE r.state = 'succeeded' AND (finish_reason IS NULL OR text IS NULL)""",
    "requests = items x points": """
        SELECT count(*) FROM jobs j WHERE planned_at IS NOT NULL AND
            (SELECT count(*) FROM requests r WHERE r.job_id = j.id) <>
            (SELECT count(*) FROM items i WHERE i.job_id = j.id) *
            (SELECT count(*) FROM points p WHERE p.job_id = j.id)""",
    "choices = requests x n": """
        SELECT count(*) FROM requests r WHERE
            n <> (SELECT count(*) FROM choices c WHERE c.request_id = r.id)""",
    "an attempt has at most one usage, and no usage is of a later one": """
        SELECT count(*) FROM usage u JOIN requests r ON r.id = u.request_id
        WHERE u.attempt > r.attempt OR u.attempt < 1""",
}
_WATCHED = {
    "requests": (
        "NEW.epoch < OLD.epoch OR NEW.attempt < OLD.attempt"
        " OR (OLD.state IN ('succeeded', 'cancelled') AND NEW.state <> OLD.state)"
    ),
    "choices": (
        "NEW.n_tokens < OLD.n_tokens"
        " OR (OLD.finish_reason IS NOT NULL AND NEW.finish_reason IS NOT NULL"
        " AND NEW.finish_reason <> OLD.finish_reason)"
        " OR (OLD.finish_reason IS NOT NULL AND NEW.finish_reason IS NULL)"
    ),
    "chunks": "1 = 1",
}


@dataclass(frozen=True, slots=True)
class Made:
    """What one choice came to: everything that a fault may not change."""

    seed: int
    state: str
    error: str | None
    finish_reason: str | None
    text: str | None
    token_ids: bytes
    chunk_text: str
    logprobs: str


Result = Mapping[tuple[int, int, int], Made]
"""(item position, point position, choice) -> what it came to."""


def watch(engine: Engine) -> None:
    """Note every change that may never be; see `violations`."""
    with engine.begin() as tx:
        tx.execute(text("CREATE TABLE fault_notes (said text NOT NULL)"))
        for table, condition in _WATCHED.items():
            if engine.dialect.name == "sqlite":
                tx.exec_driver_sql(
                    f"CREATE TRIGGER watch_{table} AFTER UPDATE ON {table} WHEN {condition}"
                    f" BEGIN INSERT INTO fault_notes VALUES ('{table}'); END"
                )
                continue
            tx.exec_driver_sql(
                f"CREATE FUNCTION note_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                f" IF {condition} THEN INSERT INTO fault_notes VALUES ('{table}'); END IF;"
                " RETURN NULL; END $$"
            )
            tx.exec_driver_sql(
                f"CREATE TRIGGER watch_{table} AFTER UPDATE ON {table}"
                f" FOR EACH ROW EXECUTE FUNCTION note_{table}()"
            )


def result(engine: Engine, job_number: int) -> dict[tuple[int, int, int], Made]:
    """Every choice of a job, its chunks joined in the order of their tokens."""
    between = {"low": job_number * PER_JOB, "high": (job_number + 1) * PER_JOB}
    chunks: dict[tuple[int, int], list[tuple[bytes, str, str]]] = {}
    with engine.connect() as connection:
        stored = connection.execute(text(_CHUNKS), between)
        for request_id, choice, token_ids, words, logprobs in stored:
            entries = json.loads(logprobs) if isinstance(logprobs, str) else logprobs
            said = json.dumps(entries)[1:-1] if entries else ""
            chunks.setdefault((request_id, choice), []).append((bytes(token_ids), words, said))
        rows = connection.execute(text(_CHOICES), between).all()
    return {
        (row.item_id % PER_JOB, row.point_id % PER_JOB, row.choice): _made(
            row, chunks.get((row.id, row.choice), [])
        )
        for row in rows
    }


def violations(
    engine: Engine, jobs: list[int], golden: Result, *, guilty: Mapping[int, str] | None = None
) -> list[str]:
    """Every law that is broken, and every job that is not the golden one; empty when all is well.

    `guilty`: ids of requests that must have failed, and with which code.
    """
    found: list[str] = []
    with engine.connect() as connection:
        for law, sql in LAWS.items():
            if count := connection.execute(text(sql)).scalar_one():
                found.append(f"{law}: {count}")
        for said, count in connection.execute(
            text("SELECT said, count(*) FROM fault_notes GROUP BY said")
        ):
            found.append(f"an update of {said} that may never be: {count}")
    for number in jobs:
        found += _differences(number, result(engine, number), golden, dict(guilty or {}))
    return found


def _differences(number: int, got: Result, golden: Result, guilty: dict[int, str]) -> list[str]:
    points = 1 + max(point for _, point, _ in golden)
    found = [] if got.keys() == golden.keys() else [f"job {number}: other requests than planned"]
    for key, made in got.items():
        code = guilty.get(number * PER_JOB + key[0] * points + key[1])
        if code is not None and (made.state, made.error) != ("failed", code):
            found.append(f"job {number} {key}: expected failed {code}, got {made}")
        if code is None and made != golden.get(key):
            found.append(f"job {number} {key}: expected {golden.get(key)}, got {made}")
    return found


def _made(row: object, chunks: list[tuple[bytes, str, str]]) -> Made:
    return Made(
        seed=row.seed,  # type: ignore[attr-defined]
        state=row.state,  # type: ignore[attr-defined]
        error=row.error_code,  # type: ignore[attr-defined]
        finish_reason=row.finish_reason,  # type: ignore[attr-defined]
        text=row.text,  # type: ignore[attr-defined]
        token_ids=b"".join(chunk[0] for chunk in chunks),
        chunk_text="".join(chunk[1] for chunk in chunks),
        logprobs=", ".join(chunk[2] for chunk in chunks if chunk[2]),
    )


_CHUNKS = """
    SELECT request_id, choice, token_ids, text, logprobs FROM chunks
    WHERE request_id >= :low AND request_id < :high ORDER BY request_id, choice, token_start"""
_CHOICES = """
    SELECT r.id, r.item_id, r.point_id, r.seed, r.state, r.error_code,
           c.choice, c.finish_reason, c.text
    FROM requests r JOIN choices c ON c.request_id = r.id
    WHERE r.id >= :low AND r.id < :high"""
