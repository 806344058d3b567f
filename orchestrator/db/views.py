"""Every read; here what workers and graders ask of a job, the rest imported from its files.

Jobs (`listing.py`), their sums and pace (`tallies.py`), events (`events.py`), requests
(`requests.py`), the points of a sweep (`points.py`, `kept.py`), what completions hold
(`results.py`), workers and what waits for them (`waiting.py`).

All functions return frozen values; none keeps a transaction open after it returns. Knows nothing
of how a table is drawn or a JSON answer is shaped.
"""

from typing import Any

from sqlalchemy import func, select

from orchestrator.db.database import Database
from orchestrator.db.events import Event, events
from orchestrator.db.kept import points_page
from orchestrator.db.listing import (
    Job,
    JobStatus,
    find_job,
    job,
    job_status,
    jobs,
    jobs_page,
    same_jobs,
    version,
)
from orchestrator.db.points import PointSummary, PointTotals, points_summary
from orchestrator.db.requests import ErrorGroup, RequestStatus, errors, request, requests
from orchestrator.db.results import (
    ChoiceResult,
    Result,
    Ungraded,
    UsageTotal,
    choices,
    chunks_after,
    results,
    ungraded,
)
from orchestrator.db.standing import Standing, standing
from orchestrator.db.tables import QUEUED, JobRow, RequestRow
from orchestrator.db.tallies import Pace, pace
from orchestrator.db.waiting import (
    QueueDepth,
    Waiting,
    Worker,
    live_workers,
    queue_depths,
    waiting,
    workers,
)
from orchestrator.spec.job import GraderSpec


def graders(db: Database, job_id: str) -> list[GraderSpec]:
    """The graders that the job was submitted with. Raises NotFound."""
    stored: Any = job(db, job_id).spec["graders"]
    return [GraderSpec(**grader) for grader in stored]


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


__all__ = [
    "ChoiceResult",
    "ErrorGroup",
    "Event",
    "Job",
    "JobStatus",
    "Pace",
    "PointSummary",
    "PointTotals",
    "QueueDepth",
    "RequestStatus",
    "Result",
    "Standing",
    "Ungraded",
    "UsageTotal",
    "Waiting",
    "Worker",
    "choices",
    "chunks_after",
    "claimable",
    "errors",
    "events",
    "find_job",
    "graders",
    "job",
    "job_status",
    "jobs",
    "jobs_page",
    "live_workers",
    "pace",
    "points_page",
    "points_summary",
    "queue_depths",
    "request",
    "requests",
    "results",
    "same_jobs",
    "standing",
    "ungraded",
    "version",
    "waiting",
    "workers",
]
