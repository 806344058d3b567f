"""What a reconciler asks for: models with work, jobs at their end that may lack scores.

Both questions are answered by small indexes, whatever the number of requests. Knows nothing of
messages or of how a score is made.
"""

from sqlalchemy import ColumnElement, Select, exists, select, update

from orchestrator.db.columns import now
from orchestrator.db.database import Database
from orchestrator.db.events import ENDED, note
from orchestrator.db.tables import QUEUED, RUNNING, JobRow, RequestRow, job_status

_JOBS_AT_ONCE = 100


def waiting_models(db: Database) -> tuple[str, ...]:
    """The models of jobs that have queued requests and are neither paused nor cancelled."""
    waiting = (
        select(JobRow.model)
        .where(
            JobRow.planned_at.is_not(None),
            JobRow.paused_at.is_(None),
            JobRow.cancelled_at.is_(None),
            _has(QUEUED),
        )
        .distinct()
        .order_by(JobRow.model)
    )
    with db.read() as rows:
        return tuple(rows.scalars(waiting))


def ungraded_jobs(db: Database) -> tuple[str, ...]:
    """The ids of the oldest jobs that have ended and are not marked as graded, at most 100."""
    ended = select(JobRow.id).where(*_ended()).order_by(JobRow.id).limit(_JOBS_AT_ONCE)
    with db.read() as rows:
        return tuple(rows.scalars(ended))


def note_ended(db: Database) -> tuple[str, ...]:
    """Write down of each job that has ended that it has, once for each end; their ids."""
    wanted = select(JobRow.id).where(
        JobRow.planned_at.is_not(None), JobRow.ended_at.is_(None), ~_has(QUEUED), ~_has(RUNNING)
    )
    some = wanted.order_by(JobRow.id).limit(_JOBS_AT_ONCE)
    with db.read() as rows:
        found = rows.scalars(some).all()
    return tuple(job_id for job_id in found if _note_ended(db, wanted, job_id))


def _note_ended(db: Database, ended: Select[str], job_id: str) -> bool:
    this = ended.where(JobRow.id == job_id).with_for_update()
    with db.write() as tx:
        if tx.scalar(this) is None:
            return False
        state = tx.scalars(
            select(job_status.c.state).where(job_status.c.id == job_id)
        ).one_or_none()
        tx.execute(update(JobRow).where(JobRow.id == job_id).values(ended_at=now()))
        note(tx, [job_id], ENDED, state)
    return True


def has_ended(db: Database, job_id: str) -> bool:
    """Whether every request of the job is at its end."""
    with db.read() as rows:
        ended = select(JobRow.id).where(JobRow.id == job_id, ~_has(QUEUED), ~_has(RUNNING))
        return rows.scalar(ended) is not None


def mark_graded(db: Database, job_id: str) -> None:
    """The job has ended and every score is written; nothing happens if it has begun again."""
    with db.write() as tx:
        tx.execute(update(JobRow).where(JobRow.id == job_id, *_ended()).values(graded_at=now()))


def _ended() -> tuple[ColumnElement[bool], ...]:
    planned, ungraded = JobRow.planned_at.is_not(None), JobRow.graded_at.is_(None)
    return planned, ungraded, ~_has(QUEUED), ~_has(RUNNING)


def _has(state: str) -> ColumnElement[bool]:
    return exists().where(RequestRow.job_id == JobRow.id, RequestRow.state == state)
