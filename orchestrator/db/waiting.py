"""Who could work, what waits, and why it does.

Knows nothing of who claims what in the end (`turns.py` decides), nor of how reasons are shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    ScalarSelect,
    bindparam,
    case,
    exists,
    func,
    or_,
    select,
    text,
)

from orchestrator.db.columns import now, seconds_from_now, unranked
from orchestrator.db.database import Database
from orchestrator.db.tables import DELAYED, SUSPECT, JobRow, RequestRow, TallyRow, WorkerRow
from orchestrator.db.tallies import tallied
from orchestrator.errors import NotFound

ALIVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker that has not left; `alive`: it was seen within the asked time.

    The last three are what it reported then: choices in its slots, tokens a second since the
    report before, memory of its model and its slots in bytes.
    """

    id: str
    hostname: str
    pid: int
    model: str
    device: str
    slots: int
    started_at: datetime
    seen_at: datetime
    alive: bool
    slots_used: int | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """What one model has to do: requests of jobs that are neither paused nor cancelled.

    `oldest_waiting_seconds`: since the oldest job with a queued request was planned; None when
    nothing is queued.
    """

    model: str
    queued: int
    running: int
    oldest_waiting_seconds: float | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why queued requests of a job do not run yet, in words; empty when none is queued."""

    reasons: tuple[str, ...]


def workers(db: Database, *, alive_seconds: float = ALIVE_SECONDS) -> list[Worker]:
    """All that have registered and not left, the oldest first, alive or not."""
    with db.read() as rows:
        return _workers(rows, alive_seconds)


def live_workers(db: Database, *, alive_seconds: float = ALIVE_SECONDS) -> list[Worker]:
    """Those seen within that time, on the database's clock."""
    return [worker for worker in workers(db, alive_seconds=alive_seconds) if worker.alive]


def queue_depths(db: Database) -> dict[str, QueueDepth]:
    """By model: what is queued and running, and how long the oldest of it has waited."""
    queued, running = tallied("queued"), tallied("running")
    claimable = JobRow.paused_at.is_(None) & JobRow.cancelled_at.is_(None)
    jobs = select(
        JobRow.model,
        case((claimable, queued), else_=0).label("queued"),
        running.label("running"),
        JobRow.planned_at,
    ).where(JobRow.planned_at.is_not(None), or_(*map(_has, ("queued", "running"))))
    jobs = jobs.order_by(JobRow.model)
    with db.read() as rows:
        clock = rows.execute(select(now())).scalar_one()
        found = rows.execute(jobs).all()
    depths: dict[str, QueueDepth] = {}
    for row in found:
        before = depths.get(row.model, QueueDepth(row.model, 0, 0, None))
        waited = before.oldest_waiting_seconds
        if row.queued:
            waited = max(waited or 0.0, (clock - row.planned_at).total_seconds())
        depths[row.model] = QueueDepth(
            row.model, before.queued + row.queued, before.running + row.running, waited
        )
    return depths


def waiting(db: Database, job_id: str) -> Waiting:
    """Why the job's queued requests do not run now. Raises NotFound, also until it is planned."""
    with db.read() as rows:
        return waiting_seen(rows, job_id)


def waiting_seen(rows: Connection, job_id: str) -> Waiting:
    """As `waiting`, of what this transaction sees."""
    job = rows.execute(_JOB, {"job_id": job_id}).one_or_none()
    if job is None:
        raise NotFound("job", job_id)
    if job.cancelled_at is not None or not job.ready + job.suspects + job.delayed:
        return Waiting(())
    if job.paused_at is not None:
        return Waiting(("paused",))
    live = [worker for worker in _workers(rows, ALIVE_SECONDS) if worker.alive]
    serving = [worker for worker in live if worker.model == job.model]
    others: Sequence[Any] = ()
    if serving:
        others = rows.execute(_OTHERS, {"job_id": job_id, "model": job.model}).all()
    return Waiting(tuple(_reasons(job, others, serving)))


def _workers(rows: Connection, alive_seconds: float) -> list[Worker]:
    recent = WorkerRow.seen_at >= seconds_from_now(-alive_seconds)
    alive = case((recent, 1), else_=0).label("alive")
    names = [name for name in Worker.__dataclass_fields__ if name != "alive"]
    columns = [getattr(WorkerRow, name) for name in names]
    found = rows.execute(
        select(*columns, alive)
        .where(WorkerRow.stopped_at.is_(None))
        .order_by(WorkerRow.started_at, WorkerRow.id)
    )
    return [Worker(**{**row._mapping, "alive": bool(row.alive)}) for row in found]


def _reasons(job: Any, others: Sequence[Any], serving: Sequence[Worker]) -> Iterator[str]:
    if not serving:
        yield f"no live worker serves model {job.model}"
    if job.max_parallel is not None and job.running >= job.max_parallel:
        yield f"over its limit max_parallel {job.max_parallel}"
    elif serving and job.ready and (busy := _busy(job, others, serving)):
        yield busy
    if job.delayed:
        yield f"waiting for retry at {job.retry_at:%Y-%m-%d %H:%M:%S} UTC ({job.delayed} requests)"
    if job.suspects:
        yield f"{job.suspects} requests that may have stopped a worker are tried one at a time"


def _busy(job: Any, others: Sequence[Any], serving: Sequence[Worker]) -> str | None:
    """None when a slot is free. A claimed request may have several choices: believe the worker."""
    slots = sum(worker.slots for worker in serving)
    running = job.running + sum(int(other.running) for other in others)
    if max(running, sum(worker.slots_used or 0 for worker in serving)) < slots:
        return None
    ahead = sum(int(other.queued) for other in others if other.priority > job.priority)
    equals = sum(other.jobs for other in others if other.priority == job.priority)
    share = f", shared with {equals} jobs of the same priority" if equals else ""
    return f"all {slots} slots are busy, {ahead} requests are ahead{share}"


def _count(condition: str) -> ScalarSelect[int]:
    return (
        select(func.count())
        .where(unranked(RequestRow.job_id) == JobRow.id, text(condition))
        .scalar_subquery()
    )


def _has(state: str) -> ColumnElement[bool]:
    return exists().where(RequestRow.job_id == JobRow.id, text(f"state = '{state}'"))


_SUSPECTS, _DELAYED = _count(SUSPECT), _count(DELAYED)
_JOB = select(
    JobRow.model,
    JobRow.priority,
    JobRow.max_parallel,
    JobRow.paused_at,
    JobRow.cancelled_at,
    tallied("running").label("running"),
    # Not counted one by one: there may be millions.
    (tallied("queued") - _SUSPECTS - _DELAYED).label("ready"),
    _SUSPECTS.label("suspects"),
    _DELAYED.label("delayed"),
    select(func.min(RequestRow.retry_at))
    .where(unranked(RequestRow.job_id) == JobRow.id, text(DELAYED))
    .scalar_subquery()
    .label("retry_at"),
).where(JobRow.id == bindparam("job_id"), JobRow.planned_at.is_not(None))
_OPEN = (
    select(
        JobRow.priority,
        func.sum(TallyRow.queued).label("queued"),
        func.sum(TallyRow.running).label("running"),
    )
    .join(TallyRow, TallyRow.number == JobRow.number)
    .where(
        JobRow.model == bindparam("model"),
        JobRow.id != bindparam("job_id"),
        JobRow.planned_at.is_not(None),
        JobRow.ended_at.is_(None),
        JobRow.paused_at.is_(None),
        JobRow.cancelled_at.is_(None),
    )
    .group_by(JobRow.id, JobRow.priority)
    .having(func.sum(TallyRow.queued + TallyRow.running) > 0)
    .subquery()
)
_OTHERS = select(
    _OPEN.c.priority,
    func.count().label("jobs"),
    func.sum(_OPEN.c.queued).label("queued"),
    func.sum(_OPEN.c.running).label("running"),
).group_by(_OPEN.c.priority)
