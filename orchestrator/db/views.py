"""Every read. Here: jobs and requests.

The points of a sweep (`points.py`), what completions hold (`results.py`), workers and what waits
for them (`waiting.py`) stand in files of their own and are imported from here.

All functions return frozen values; none keeps a transaction open after it returns. Knows nothing
of how a table is drawn or a JSON answer is shaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select

from orchestrator.db.database import Database
from orchestrator.db.points import PointSummary, points_summary
from orchestrator.db.results import (
    ChoiceResult,
    Result,
    Ungraded,
    UsageTotal,
    chunks_after,
    results,
    ungraded,
)
from orchestrator.db.tables import (
    QUEUED,
    ChoiceRow,
    ItemRow,
    JobRow,
    PointRow,
    RequestRow,
)
from orchestrator.db.tables import job_status as status_view
from orchestrator.db.waiting import (
    QueueDepth,
    Waiting,
    Worker,
    live_workers,
    queue_depths,
    waiting,
    workers,
)
from orchestrator.errors import Conflict, NotFound
from orchestrator.spec.job import GraderSpec
from orchestrator.spec.limits import MAX_ATTEMPTS


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it was submitted; `spec` has the keys params, graders, limits, dataset."""

    id: str
    number: int
    name: str
    model: str
    priority: int
    seed: int
    spec: Mapping[str, object]
    source: str
    digest: str
    n_items: int
    n_points: int
    n_requests: int
    n_choices: int
    created_at: datetime
    paused_at: datetime | None
    cancelled_at: datetime | None
    deadline_at: datetime | None = None
    cancel_reason: str | None = None
    max_parallel: int | None = None
    max_attempts: int = MAX_ATTEMPTS


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One row of the view `job_status`; `finished_at` is None until every request has ended."""

    id: str
    name: str
    model: str
    state: str
    requests: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    replayed_tokens: int
    created_at: datetime
    finished_at: datetime | None
    cancel_reason: str | None = None
    deadline_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """One request and where it stands; `n_tokens` is summed over its choices.

    A queued one with an error had it in its last attempt; it is tried again from `retry_at` on.
    """

    id: int
    job_id: str
    state: str
    epoch: int
    attempt: int
    idle_attempts: int
    seed: int
    n: int
    n_tokens: int
    item_position: int
    custom_id: str
    point_position: int
    worker_id: str | None
    error_code: str | None
    error_message: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    retry_at: datetime | None = None
    failures: int = 0


def find_job(db: Database, given: str) -> str:
    """The id of the job meant: its id, its name (the newest of that name), or its id's beginning.

    Raises NotFound, and Conflict when several ids begin so.
    """
    planned = JobRow.planned_at.is_not(None)
    with db.read() as rows:
        found = rows.scalar(select(JobRow.id).where(planned, JobRow.id == given))
        newest = select(JobRow.id).where(planned, JobRow.name == given)
        found = found or rows.scalar(newest.order_by(JobRow.number.desc()).limit(1))
        if found is not None:
            return found
        # An exact comparison of the beginning: LIKE ignores case on SQLite, and `_` is in ids.
        begins = func.substr(JobRow.id, 1, len(given)) == given
        several = rows.scalars(select(JobRow.id).where(planned, begins).limit(2)).all()
    if not given or not several:
        raise NotFound("job", given)
    if len(several) > 1:
        raise Conflict("job", given, f"several ids begin so: {', '.join(several)}, ...")
    return several[0]


def job(db: Database, job_id: str) -> Job:
    """The job as it was submitted. Raises NotFound."""
    columns = [getattr(JobRow, name) for name in Job.__dataclass_fields__]
    with db.read() as rows:
        row = rows.execute(
            select(*columns).where(JobRow.id == job_id, JobRow.planned_at.is_not(None))
        ).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    return Job(*row)


def graders(db: Database, job_id: str) -> list[GraderSpec]:
    """The graders that the job was submitted with. Raises NotFound."""
    stored: Any = job(db, job_id).spec["graders"]
    return [GraderSpec(**grader) for grader in stored]


def same_jobs(db: Database, name: str, digest: str) -> list[str]:
    """Ids of the jobs of this name and content, the newest first."""
    same = select(JobRow.id).where(
        JobRow.name == name, JobRow.digest == digest, JobRow.planned_at.is_not(None)
    )
    with db.read() as rows:
        return list(rows.scalars(same.order_by(JobRow.number.desc())))


def job_status(db: Database, job_id: str) -> JobStatus:
    """The job's state, requests by state and tokens so far. Raises NotFound."""
    with db.read() as rows:
        row = rows.execute(select(status_view).where(status_view.c.id == job_id)).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    return JobStatus(*row)


def jobs(db: Database, limit: int = 20) -> list[JobStatus]:
    """The newest jobs, newest first."""
    newest = (
        select(JobRow.id)
        .where(JobRow.planned_at.is_not(None))
        .order_by(JobRow.number.desc())
        .limit(limit)
    )
    with db.read() as rows:
        ids = rows.scalars(newest).all()
        found = rows.execute(select(status_view).where(status_view.c.id.in_(ids))).all()
    by_id = {row.id: JobStatus(*row) for row in found}
    return [by_id[job_id] for job_id in ids if job_id in by_id]


def requests(
    db: Database,
    job_id: str,
    *,
    states: Sequence[str] = (),
    after: int = -1,
    limit: int = 100,
) -> list[RequestStatus]:
    """The job's requests in order of id, those after the id `after`; all states if none given."""
    wanted = _request_status().where(RequestRow.job_id == job_id, RequestRow.id > after)
    if states:
        wanted = wanted.where(RequestRow.state.in_(states))
    with db.read() as rows:
        found = rows.execute(wanted.order_by(RequestRow.id).limit(limit)).all()
    return [RequestStatus(*row) for row in found]


def request(db: Database, request_id: int) -> RequestStatus:
    """One request. Raises NotFound."""
    with db.read() as rows:
        row = rows.execute(_request_status().where(RequestRow.id == request_id)).one_or_none()
    if row is None:
        raise NotFound("request", str(request_id))
    return RequestStatus(*row)


def claimable(db: Database, model: str) -> int:
    """How many requests of the model a worker could claim now."""
    with db.read() as rows:
        return rows.scalars(
            select(func.count())
            .select_from(RequestRow)
            .join(JobRow, JobRow.id == RequestRow.job_id)
            .where(
                JobRow.model == model,
                JobRow.planned_at.is_not(None),
                JobRow.paused_at.is_(None),
                JobRow.cancelled_at.is_(None),
                RequestRow.state == QUEUED,
            )
        ).one()


def _request_status() -> Select[Any]:
    n_tokens = (
        select(func.coalesce(func.sum(ChoiceRow.n_tokens), 0))
        .where(ChoiceRow.request_id == RequestRow.id)
        .scalar_subquery()
    )
    elsewhere = {
        "n_tokens": n_tokens,
        "item_position": ItemRow.position,
        "custom_id": ItemRow.custom_id,
        "point_position": PointRow.position,
    }
    columns = (
        elsewhere[name] if name in elsewhere else getattr(RequestRow, name)
        for name in RequestStatus.__dataclass_fields__
    )
    return (
        select(*columns)
        .join(ItemRow, ItemRow.id == RequestRow.item_id)
        .join(PointRow, PointRow.id == RequestRow.point_id)
    )


__all__ = [
    "ChoiceResult",
    "Job",
    "JobStatus",
    "PointSummary",
    "QueueDepth",
    "RequestStatus",
    "Result",
    "Ungraded",
    "UsageTotal",
    "Waiting",
    "Worker",
    "chunks_after",
    "claimable",
    "find_job",
    "graders",
    "job",
    "job_status",
    "jobs",
    "live_workers",
    "points_summary",
    "queue_depths",
    "request",
    "requests",
    "results",
    "same_jobs",
    "ungraded",
    "waiting",
    "workers",
]
