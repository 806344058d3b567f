"""What happened to a job, in the order in which it happened, written by the transitions themselves.

The words: submitted, started (its first claim), paused, resumed, retried (how many), cancelled
(the reason), deadline, ended (its state). Knows nothing of who reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select, text

from orchestrator.db.database import Database
from orchestrator.db.tables import EventRow

SUBMITTED, STARTED, PAUSED, RESUMED = "submitted", "started", "paused", "resumed"
RETRIED, CANCELLED, DEADLINE, ENDED = "retried", "cancelled", "deadline", "ended"


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a job; `id` rises with time."""

    id: int
    at: datetime
    event: str
    detail: str | None


def events(db: Database, job_id: str, *, after: int = 0, limit: int = 200) -> list[Event]:
    """The job's events after the id `after`, the oldest first."""
    columns = [getattr(EventRow, name) for name in Event.__dataclass_fields__]
    wanted = select(*columns).where(EventRow.job_id == job_id, EventRow.id > after)
    with db.read() as rows:
        found = rows.execute(wanted.order_by(EventRow.id).limit(limit)).all()
    return [Event(*row) for row in found]


def note(tx: Connection, job_ids: Sequence[str], event: str, detail: str | None = None) -> None:
    """Write the event down for each of the jobs, in the transaction that makes it true."""
    if job_ids:
        rows = [{"job_id": job_id, "event": event, "detail": detail} for job_id in job_ids]
        tx.execute(insert(EventRow), rows)


def note_started(tx: Connection, job_ids: Sequence[str]) -> None:
    """That each was claimed for the first time, once, whoever else is just noting it."""
    if job_ids:
        rows = [{"job_id": job_id, "event": STARTED} for job_id in job_ids]
        tx.execute(_STARTED, rows)


_STARTED = text(
    "INSERT INTO events (job_id, event) VALUES (:job_id, :event)"
    " ON CONFLICT (job_id) WHERE event = 'started' DO NOTHING"
)
