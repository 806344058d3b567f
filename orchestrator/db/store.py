"""Every write, one function per transition, each in its own transaction.

Here: jobs, workers, scores. Plans (`plans.py`), claims (`claims.py`), what comes back
(`releases.py`) and flushes (`flushes.py`) stand in files of their own and are imported from here.
Knows nothing of messages: whoever writes and must wake a worker does so after the commit
(`orchestrator.lifecycle`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, bindparam, case, exists, func, select, text, update

from orchestrator.db import events
from orchestrator.db.claims import Claimed, ClaimedChoice, claim
from orchestrator.db.columns import Words, now
from orchestrator.db.database import Database
from orchestrator.db.events import note
from orchestrator.db.flushes import flush
from orchestrator.db.plans import Origin, insert_job, remove_unplanned, submitted
from orchestrator.db.releases import (
    DEADLINE,
    LATE,
    excuse,
    forget_workers,
    release,
    release_expired,
    release_worker,
)
from orchestrator.db.tables import (
    CANCELLED,
    FAILED,
    QUEUED,
    ROWS_PER_JOB,
    RUNNING,
    JobRow,
    RequestRow,
    WorkerRow,
)
from orchestrator.db.writes import ChoiceEnd, ChunkWrite, Flushed, RequestWrite, UsageWrite
from orchestrator.errors import Conflict, NotFound


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One process with one device and one engine, as it introduces itself."""

    id: str
    hostname: str
    pid: int
    model: str
    device: str
    slots: int


@dataclass(frozen=True, slots=True)
class ScoreWrite:
    """What one grader said of one choice; a second score by the same grader replaces the first."""

    request_id: int
    choice: int
    grader: str
    score: float
    detail: str | None = None


def register_worker(db: Database, worker: WorkerInfo) -> None:
    """Enter a worker as running and seen now; entering it again counts as seeing it."""
    with db.write() as tx:
        tx.execute(_WORKER, asdict(worker))
        seen = update(WorkerRow).where(WorkerRow.id == worker.id)
        tx.execute(seen.values(seen_at=now(), stopped_at=None))


def see_worker(
    db: Database,
    worker_id: str,
    *,
    slots: int | None = None,
    slots_used: int | None = None,
    tokens_per_second: float | None = None,
    memory_bytes: int | None = None,
) -> None:
    """The worker is alive: its heartbeat, on the database's clock, with what it measured.

    `slots`: how many it has now, where that has changed since it was registered.
    A worker that had been given up for dead (`forget_workers`) counts as one again.
    """
    with db.write() as tx:
        tx.execute(
            update(WorkerRow)
            .where(WorkerRow.id == worker_id)
            .values(
                seen_at=now(),
                stopped_at=None,
                slots=WorkerRow.slots if slots is None else slots,
                slots_used=slots_used,
                tokens_per_second=tokens_per_second,
                memory_bytes=memory_bytes,
            )
        )


def stop_worker(db: Database, worker_id: str) -> None:
    """The worker has left. What it still holds comes back by `release_worker` or by its leases."""
    with db.write() as tx:
        tx.execute(update(WorkerRow).where(WorkerRow.id == worker_id).values(stopped_at=now()))


def pause_job(db: Database, job_id: str) -> None:
    """Claim no more of it; running requests come back at their next flush, tokens kept.

    Raises NotFound, Conflict when nothing is left to pause.
    """
    with db.write() as tx:
        _locked_unfinished(tx, job_id)
        going_on = update(JobRow).where(JobRow.id == job_id, JobRow.paused_at.is_(None))
        if tx.execute(going_on.values(paused_at=now())).rowcount:
            note(tx, [job_id], events.PAUSED)


def resume_job(db: Database, job_id: str) -> None:
    """Undo a pause; nothing happens to a job that is not paused.

    Raises NotFound, Conflict for a cancelled job.
    """
    with db.write() as tx:
        _refuse_cancelled(tx, job_id)
        paused = update(JobRow).where(JobRow.id == job_id, JobRow.paused_at.is_not(None))
        if tx.execute(paused.values(paused_at=None)).rowcount:
            note(tx, [job_id], events.RESUMED)


def cancel_job(db: Database, job_id: str, reason: str | None = None) -> None:
    """Cancel what is queued; running requests end at their next flush, their text kept.

    The first cancellation's `reason` stands in the job's `cancel_reason`. Raises NotFound,
    Conflict when every request has ended already.
    """
    with db.write() as tx:
        if not _locked_unfinished(tx, job_id):
            note(tx, [job_id], events.CANCELLED, reason)
        _cancel(tx, job_id, reason)


def expire_deadlines(db: Database) -> list[str]:
    """Cancel the jobs that have not ended by their deadline; their ids.

    Their requests that have not ended get the error code `deadline`.
    """
    unfinished = exists().where(
        RequestRow.job_id == JobRow.id, RequestRow.state.in_([QUEUED, RUNNING])
    )
    late = (
        select(JobRow.id)
        .where(
            JobRow.deadline_at <= select(now()).scalar_subquery(),
            JobRow.cancelled_at.is_(None),
            JobRow.planned_at.is_not(None),
            unfinished,
        )
        .order_by(JobRow.id)
    )
    with db.read() as rows:  # looked at often, and seldom true: no writer is kept waiting
        if not rows.scalars(late).all():
            return []
    with db.write() as tx:
        expired = list(tx.scalars(late.with_for_update(of=JobRow)))
        for job_id in expired:
            _cancel(tx, job_id, DEADLINE, error=(DEADLINE, LATE))
        note(tx, expired, events.DEADLINE)
    return expired


def retry_failed(db: Database, job_id: str) -> int:
    """Queue the job's failed requests again, their tokens kept; return how many.

    Raises NotFound, Conflict for a cancelled job.
    """
    with db.write() as tx:
        _refuse_cancelled(tx, job_id)
        _update_job(tx, job_id, graded_at=None)
        again = update(RequestRow).where(RequestRow.job_id == job_id, RequestRow.state == FAILED)
        nothing = ("retry_at", "error_code", "error_message", "finished_at")
        anew = dict.fromkeys(("idle_attempts", "excused", "failures"), 0)
        retried = tx.execute(again.values(state=QUEUED, **anew, **dict.fromkeys(nothing))).rowcount
        if retried:
            _update_job(tx, job_id, ended_at=None)
            note(tx, [job_id], events.RETRIED, str(retried))
        return retried


def insert_scores(db: Database, scores: Sequence[ScoreWrite]) -> None:
    """Write scores in one transaction, replacing those of the same choice and grader.

    A job that was marked as graded is to be marked again: what it comes to is another now.
    """
    if scores:
        numbers = {score.request_id // ROWS_PER_JOB for score in scores}
        graded = JobRow.number.in_(numbers), JobRow.graded_at.is_not(None)
        with db.write() as tx:
            tx.execute(_SCORE, [asdict(score) for score in scores])
            tx.execute(update(JobRow).where(*graded).values(graded_at=None))


def _locked_state(tx: Connection, job_id: str) -> tuple[bool, bool]:
    """Whether the job is cancelled, and whether a request of it has not ended; locks the job."""
    job = select(JobRow.cancelled_at).where(JobRow.id == job_id, JobRow.planned_at.is_not(None))
    row = tx.execute(job.with_for_update()).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    mine = select(RequestRow.id).where(RequestRow.job_id == job_id).limit(1)
    left = any(
        tx.scalar(mine.where(RequestRow.state == state)) is not None for state in (QUEUED, RUNNING)
    )
    return row.cancelled_at is not None, left


def _locked_unfinished(tx: Connection, job_id: str) -> bool:
    """Whether it is cancelled, and yet running."""
    cancelled, left = _locked_state(tx, job_id)
    if not left:
        raise Conflict("job", job_id, "cancelled already" if cancelled else "finished already")
    return cancelled


def _refuse_cancelled(tx: Connection, job_id: str) -> None:
    if _locked_state(tx, job_id)[0]:
        raise Conflict("job", job_id, "cancelled")


def _cancel(
    tx: Connection,
    job_id: str,
    reason: str | None,
    error: tuple[str | None, str | None] = (None, None),
) -> None:
    # The job first: who gives a request back meanwhile either sees this or is seen below.
    _update_job(
        tx,
        job_id,
        cancel_reason=case((JobRow.cancelled_at.is_(None), reason), else_=JobRow.cancel_reason),
        cancelled_at=func.coalesce(JobRow.cancelled_at, now()),
        paused_at=None,
    )
    code, message = error
    tx.execute(
        update(RequestRow)
        .where(RequestRow.job_id == job_id, RequestRow.state == QUEUED)
        .values(
            state=CANCELLED,
            finished_at=now(),
            retry_at=None,
            error_code=code,
            error_message=message,
        )
    )


def _update_job(tx: Connection, job_id: str, **values: object) -> None:
    tx.execute(update(JobRow).where(JobRow.id == job_id).values(**values))


_WORKER = text(
    "INSERT INTO workers (id, hostname, pid, model, device, slots)"
    " VALUES (:id, :hostname, :pid, :model, :device, :slots)"
    " ON CONFLICT (id) DO UPDATE SET hostname = excluded.hostname, pid = excluded.pid,"
    " model = excluded.model, device = excluded.device, slots = excluded.slots"
)
_SCORE = text(
    "INSERT INTO scores (request_id, choice, grader, score, detail)"
    " VALUES (:request_id, :choice, :grader, :score, :detail)"
    " ON CONFLICT (request_id, choice, grader)"
    " DO UPDATE SET score = excluded.score, detail = excluded.detail"
).bindparams(bindparam("detail", type_=Words))

__all__ = [
    "ChoiceEnd",
    "ChunkWrite",
    "Claimed",
    "ClaimedChoice",
    "Flushed",
    "Origin",
    "RequestWrite",
    "ScoreWrite",
    "UsageWrite",
    "WorkerInfo",
    "cancel_job",
    "claim",
    "excuse",
    "expire_deadlines",
    "flush",
    "forget_workers",
    "insert_job",
    "insert_scores",
    "pause_job",
    "register_worker",
    "release",
    "release_expired",
    "release_worker",
    "remove_unplanned",
    "resume_job",
    "retry_failed",
    "see_worker",
    "stop_worker",
    "submitted",
]
