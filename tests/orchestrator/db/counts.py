"""What the triggers add up of each job, beside a full count of its rows."""

from orchestrator.db.database import Database
from orchestrator.db.tables import ROWS_PER_JOB
from tests.orchestrator.db.builders import rows

STATES = ("queued", "running", "succeeded", "failed", "cancelled")
TALLIED = f"""
SELECT j.number, sum(t.requests), {", ".join(f"sum(t.{state})" for state in STATES)},
    sum(t.prompt_tokens), sum(t.cached_tokens), sum(t.completion_tokens), sum(t.replayed_tokens)
FROM jobs AS j JOIN tallies AS t ON t.number = j.number GROUP BY j.number
HAVING sum(t.requests) > 0 ORDER BY j.number
"""
COUNTED = f"""
SELECT r.number, count(*), {", ".join(f"sum(CASE WHEN r.state = '{s}' THEN 1 ELSE 0 END)" for s in STATES)},
    sum(r.prompt), sum(r.cached), sum(r.completion), sum(r.replayed)
FROM (
    SELECT id / {ROWS_PER_JOB} AS number, state,
        coalesce((SELECT max(prompt_tokens) FROM usage WHERE request_id = id), 0) AS prompt,
        coalesce((SELECT max(cached_tokens) FROM usage WHERE request_id = id), 0) AS cached,
        coalesce((SELECT sum(completion_tokens) FROM usage WHERE request_id = id), 0) AS completion,
        coalesce((SELECT sum(replayed_tokens) FROM usage WHERE request_id = id), 0) AS replayed
    FROM requests
) AS r GROUP BY r.number ORDER BY r.number
"""  # noqa: E501
FIRST = "SELECT min(started_at) FROM {table}"


def numbers(db: Database, sql: str) -> list[tuple[int, ...]]:
    """Rows of whole numbers."""
    return [tuple(map(int, row)) for row in rows(db, sql)]


def agree(db: Database) -> None:
    """What the triggers added up is what a full count says."""
    assert numbers(db, TALLIED) == numbers(db, COUNTED)
    assert rows(db, FIRST.format(table="tallies")) == rows(db, FIRST.format(table="requests"))
