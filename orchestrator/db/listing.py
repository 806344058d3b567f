"""Jobs: found, listed, and where they stand, at the same cost whatever their size.

Knows nothing of requests one by one, nor of how a job is shown.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, String, exists, func, select, true, type_coerce

from orchestrator.db.database import Database
from orchestrator.db.tables import BATCH, JOB, JobRow, RequestRow
from orchestrator.db.tables import job_status as status_view
from orchestrator.errors import Conflict, NotFound
from orchestrator.spec.limits import MAX_ATTEMPTS

_LOOK = 200
_ID_LENGTH = 20


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it was submitted; `spec` has the keys params, graders, limits, dataset.

    `webhook` holds a secret: it is for those who send, not for those who show.
    """

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
    kind: str = JOB
    owner: str = ""
    handle: str | None = None
    webhook: Mapping[str, object] | None = None
    planned_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One row of the view `job_status`; `finished_at` is None until every request has ended.

    `started_at`: its first claim. `number`: the cursor of a listing.
    """

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
    number: int = 0
    kind: str = JOB
    owner: str = ""
    cached_tokens: int = 0
    started_at: datetime | None = None


_PLANNED = JobRow.planned_at.is_not(None)


def find_job(db: Database, given: str, *, owner: str | None = None) -> str:
    """The id of the job meant: its id, its name (the newest of that name), or its id's beginning.

    Of all jobs, or of those of `owner`. Raises NotFound, and Conflict when several ids begin so.
    """
    seen = (_PLANNED, _owned(owner))
    with db.read() as rows:
        found = rows.scalar(select(JobRow.id).where(*seen, JobRow.id == given))
        newest = select(JobRow.id).where(*seen, JobRow.name == given)
        found = found or rows.scalar(newest.order_by(JobRow.number.desc()).limit(1))
        if found is not None:
            return found
        several: Sequence[str] = ()
        if given and len(given) < _ID_LENGTH and given[:4] == "job_"[: len(given)]:
            # An exact comparison of the beginning: LIKE ignores case on SQLite; `_` is in ids.
            begins = func.substr(JobRow.id, 1, len(given)) == given
            several = rows.scalars(select(JobRow.id).where(*seen, begins).limit(2)).all()
    if not several:
        raise NotFound("job", given)
    if len(several) > 1:
        raise Conflict("job", given, f"several ids begin so: {', '.join(several)}, ...")
    return several[0]


def job(db: Database, job_id: str) -> Job:
    """The job as it was submitted. Raises NotFound."""
    columns = [getattr(JobRow, name) for name in Job.__dataclass_fields__]
    with db.read() as rows:
        row = rows.execute(select(*columns).where(JobRow.id == job_id, _PLANNED)).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    return Job(*row)


def same_jobs(db: Database, name: str, digest: str) -> list[str]:
    """Ids of the jobs of this name and content, the newest first."""
    same = select(JobRow.id).where(JobRow.name == name, JobRow.digest == digest, _PLANNED)
    with db.read() as rows:
        return list(rows.scalars(same.order_by(JobRow.number.desc())))


def job_status(db: Database, job_id: str) -> JobStatus:
    """The job's state, requests by state and tokens so far. Raises NotFound."""
    with db.read() as rows:
        row = rows.execute(select(status_view).where(status_view.c.id == job_id)).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    return JobStatus(*row)


def version(db: Database, job_id: str) -> str:
    """A short token that changes whenever the job's status, or whether it is graded, changes.

    Raises NotFound.
    """
    with db.read() as rows:
        return version_seen(rows, job_id)


def version_seen(rows: Connection, job_id: str) -> str:
    """As `version`, of what this transaction sees."""
    return status_seen(rows, job_id)[1]


def status_seen(rows: Connection, job_id: str) -> tuple[JobStatus, str]:
    """As `job_status` and `version`, both of one row."""
    more = (JobRow.paused_at, JobRow.cancelled_at, JobRow.graded_at, JobRow.ended_at)
    wanted = (
        select(status_view, *more)
        .join(JobRow, JobRow.id == status_view.c.id)
        .where(status_view.c.id == job_id, JobRow.id == job_id)
    )
    row = rows.execute(wanted).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    version = hashlib.blake2b(repr(tuple(row)).encode(), digest_size=12).hexdigest()
    return JobStatus(*row[: -len(more)]), version


def jobs(db: Database, limit: int = 20) -> list[JobStatus]:
    """The newest jobs and batches, newest first, of every owner."""
    return jobs_page(db, kinds=(JOB, BATCH), limit=limit)


def jobs_page(
    db: Database,
    *,
    owner: str | None = None,
    kinds: Sequence[str] = (JOB,),
    states: Sequence[str] = (),
    model: str | None = None,
    name: str | None = None,
    user: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    before: int | None = None,
    limit: int = 20,
) -> list[JobStatus]:
    """Jobs, newest first: of these kinds and states (all where none is named), and so on.

    `user`: with a request made for that `user`. `since` (included) and `until` (not): when they
    were created, aware times. `before`: the `number` of the last one of the page before.
    """
    wanted = [_PLANNED, _owned(owner)]
    wanted += [JobRow.kind.in_(kinds)] if kinds else []
    wanted += [JobRow.model == model] if model is not None else []
    wanted += [JobRow.name == name] if name is not None else []
    if user is not None:
        made_for = (RequestRow.job_id == JobRow.id, RequestRow.end_user == user)
        wanted += [exists().where(*made_for)]
    created = _created(db)
    wanted += [created >= _instant(db, since)] if since is not None else []
    wanted += [created < _instant(db, until)] if until is not None else []
    look = max(limit, _LOOK) if states else limit
    found: list[JobStatus] = []
    while len(found) < limit:
        earlier = JobRow.number < before if before is not None else true()
        newest = select(JobRow.id, JobRow.number).where(*wanted, earlier)
        with db.read() as rows:
            some = rows.execute(newest.order_by(JobRow.number.desc()).limit(look)).all()
            found += _statuses(rows, [row.id for row in some], states)
        if len(some) < look:
            break
        before = some[-1].number
    return found[:limit]


def _statuses(rows: Connection, ids: Sequence[str], states: Sequence[str]) -> list[JobStatus]:
    wanted = select(status_view).where(status_view.c.id.in_(ids))
    if states:
        wanted = wanted.where(status_view.c.state.in_(states))
    found = [JobStatus(*row) for row in rows.execute(wanted)] if ids else []
    return sorted(found, key=lambda status: -status.number)


def _owned(owner: str | None) -> ColumnElement[bool]:
    return true() if owner is None else JobRow.owner == owner


def _created(db: Database) -> Any:
    """When it was created, as it is compared: SQLite compares texts."""
    return type_coerce(JobRow.created_at, String) if db.dialect == "sqlite" else JobRow.created_at


def _instant(db: Database, at: datetime) -> object:
    at = at.astimezone(UTC)
    if db.dialect != "sqlite":
        return at
    return f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03}"
