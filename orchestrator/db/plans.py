"""A plan -> rows in bulk: COPY on PostgreSQL, executemany on SQLite, a thousand requests at once.

A plan of less than a batch is one transaction. Of a larger one each batch is its own, so that
running workers can flush in between; `planned_at`, set in the last one, is what makes the job
claimable and visible. Knows nothing of YAML or datasets: it
reads the plan's values as they stream by and keeps one batch of them.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.sql.elements import ColumnElement

from orchestrator.db.columns import now, seconds_from_now, storable, to_json
from orchestrator.db.database import Database
from orchestrator.db.events import SUBMITTED, note
from orchestrator.db.tables import CHAT, JOB, ROWS_PER_JOB, JobRow, TurnRow
from orchestrator.errors import Conflict, SpecError, WorkerError
from orchestrator.spec.chunks import completion_id

if TYPE_CHECKING:
    from orchestrator.spec.limits import Limits
    from orchestrator.spec.plan import Plan, PlannedRequest

BATCH = 1000
ABANDONED_SECONDS = 24 * 3600
_NUMBER_LOCK = 0x6A6F626E756D6272


@dataclass(frozen=True, slots=True)
class Origin:
    """Who submits a job, how it came in, and what they want to hear of it.

    `kind`: as `JobRow` says; a chat's `handle` is its completion's id if none is given.
    `idempotency_key`: of one owner's jobs one has it. `webhook`: {url, secret}.
    """

    owner: str = ""
    kind: str = JOB
    handle: str | None = None
    idempotency_key: str | None = None
    webhook: Mapping[str, object] | None = None


def insert_job(db: Database, plan: Plan, origin: Origin = Origin()) -> str:
    """Write a job with all its points, items, requests and choices; return its id.

    Until the last transaction the job is neither claimable nor visible. Interrupted by an error,
    its rows are removed again; killed, they stay invisible until a later call removes them.
    Raises SpecError when two items have the same custom_id or the dataset is not the one that was
    planned any more, Conflict when another job has the idempotency key, WorkerError when the
    database cannot.
    """
    if plan.verbatim != (origin.kind != JOB):
        raise ValueError(f"a plan of another sort than a {origin.kind}'s")
    if origin.kind != CHAT:  # it looks at every job, for which nobody who chats should wait
        remove_unplanned(db)
    job_id = new_job_id()
    requests = iter(plan.requests())
    batch = list(islice(requests, BATCH))
    if len(batch) < BATCH:
        with _explained(plan, origin), db.write() as tx:
            _insert_batch(tx, job_id, _begin(tx, plan, job_id, origin), len(plan.points), batch)
            _complete(tx, plan, job_id, len(batch), origin)
        return job_id
    try:
        with db.write() as tx:
            first = _begin(tx, plan, job_id, origin)
        written = 0
        while batch:
            with _explained(plan, origin), db.write() as tx:
                _insert_batch(tx, job_id, first, len(plan.points), batch)
            written += len(batch)
            batch = list(islice(requests, BATCH))
        with _explained(plan, origin), db.write() as tx:
            _complete(tx, plan, job_id, written, origin)
    except BaseException:
        # Also on Ctrl-C. A database that is gone keeps the rows, invisible.
        with contextlib.suppress(Exception):
            _remove(db, job_id)
        raise
    return job_id


def submitted(db: Database, owner: str, idempotency_key: str) -> tuple[str, str] | None:
    """(id, digest) of this owner's job with that key, or None."""
    wanted = select(JobRow.id, JobRow.digest).where(
        JobRow.owner == owner, JobRow.idempotency_key == idempotency_key
    )
    with db.read() as rows:
        found = rows.execute(wanted).one_or_none()
    return None if found is None else (found.id, found.digest)


def remove_unplanned(db: Database, *, older_than_seconds: float = ABANDONED_SECONDS) -> int:
    """Remove the jobs whose planning stopped half way, begun that long ago; return how many."""
    abandoned = delete(JobRow).where(
        JobRow.planned_at.is_(None), JobRow.created_at < seconds_from_now(-older_than_seconds)
    )
    with db.write() as tx:
        return tx.execute(abandoned).rowcount


def new_job_id() -> str:
    """`job_` and 16 characters: 48 bits of milliseconds and 32 random bits in base32 (0-9, a-v).

    Ids sort by the time they were made.
    """
    value = (time.time_ns() // 1_000_000).to_bytes(6) + secrets.token_bytes(4)
    return "job_" + base64.b32hexencode(value).decode().lower()


@contextlib.contextmanager
def _explained(plan: Plan, origin: Origin) -> Iterator[None]:
    """What the database refuses, in the words of who submitted it."""
    try:
        yield
    except IntegrityError as error:
        if "idempotency" in str(error.orig):
            key = str(origin.idempotency_key)
            raise Conflict("idempotency key", key, "another job has it") from error
        if "custom_id" not in str(error.orig):
            raise
        raise SpecError(
            f"{plan.spec.name}: dataset", "a custom_id of its own for every item", "one twice"
        ) from error


def _begin(tx: Connection, plan: Plan, job_id: str, origin: Origin) -> int:
    """The job's row and its points; the id of its first point, item and request."""
    first = _insert_job_row(tx, plan, job_id, origin) * ROWS_PER_JOB
    points = ((first + p.position, job_id, p.position, to_json(p.params)) for p in plan.points)
    _insert(tx, "points", ("id", "job_id", "position", "params"), points)
    return first


def _insert_job_row(tx: Connection, plan: Plan, job_id: str, origin: Origin) -> int:
    """The new job's number."""
    spec = plan.spec
    if tx.dialect.name == "postgresql":
        tx.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _NUMBER_LOCK})
    number = tx.scalars(select(func.coalesce(func.max(JobRow.number), 0))).one() + 1
    tx.execute(
        insert(JobRow).values(
            id=job_id,
            number=number,
            name=spec.name,
            model=spec.model,
            priority=spec.priority,
            seed=spec.seed,
            spec=_description(plan),
            source=spec.source,
            digest=spec.digest,
            n_items=plan.n_items,
            n_points=len(plan.points),
            n_requests=plan.n_requests,
            n_choices=plan.n_choices,
            deadline_at=_deadline(spec.limits),
            max_parallel=spec.limits.max_parallel,
            max_attempts=spec.limits.max_attempts,
            kind=origin.kind,
            owner=origin.owner,
            handle=_handle(origin, number, job_id),
            webhook=None if origin.webhook is None else dict(origin.webhook),
        )
    )
    tx.execute(insert(TurnRow).values(job_id=job_id))
    return number


def _handle(origin: Origin, number: int, job_id: str) -> str | None:
    """A chat is one request: its completion's id is known before the request is written."""
    if origin.handle is not None or origin.kind != CHAT:
        return origin.handle
    return completion_id(number * ROWS_PER_JOB, job_id)


def _deadline(limits: Limits) -> datetime | ColumnElement[datetime] | None:
    """When the job is over; counted from now on the database's clock where it is a duration."""
    if limits.deadline_at is not None:
        return datetime.fromisoformat(limits.deadline_at)
    return None if limits.deadline is None else seconds_from_now(limits.deadline)


def _description(plan: Plan) -> dict[str, object]:
    """What `jobs.spec` holds: keys params, graders, limits, dataset."""
    return {
        "params": dict(plan.spec.params),
        "graders": [dataclasses.asdict(grader) for grader in plan.spec.graders],
        "limits": dataclasses.asdict(plan.spec.limits),
        "dataset": plan.spec.dataset.to_json(),
    }


def _insert_batch(
    tx: Connection, job_id: str, first: int, points: int, batch: Sequence[PlannedRequest]
) -> None:
    # Requests come item by item: an item is new where its first point is.
    items = (r.item for r in batch if r.position % points == 0)
    dialect = tx.dialect.name
    _insert(
        tx,
        "items",
        ("id", "job_id", "position", "custom_id", "columns"),
        (
            (
                first + item.position,
                job_id,
                item.position,
                storable(item.custom_id, dialect),
                to_json(item.columns),
            )
            for item in items
        ),
    )
    _insert(
        tx,
        "requests",
        ("id", "job_id", "item_id", "point_id", "seed", "n", "end_user"),
        (
            (
                first + r.position,
                job_id,
                first + r.item.position,
                first + r.point.position,
                r.seed,
                r.n,
                r.user if r.user is None else storable(r.user, dialect),
            )
            for r in batch
        ),
    )
    choices = ((first + r.position, choice) for r in batch for choice in range(r.n))
    _insert(tx, "choices", ("request_id", "choice"), choices)


def _insert(
    tx: Connection, table: str, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]
) -> None:
    names = ", ".join(columns)
    if tx.dialect.name == "postgresql":
        _copy(tx, f"COPY {table} ({names}) FROM STDIN", rows)
    elif listed := list(rows):
        marks = ", ".join("?" * len(columns))
        tx.exec_driver_sql(f"INSERT INTO {table} ({names}) VALUES ({marks})", listed)  # noqa: S608


def _copy(tx: Connection, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
    driver = tx.dialect.loaded_dbapi
    cursor: Any = tx.connection.cursor()
    try:
        with cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except driver.Error as error:  # SQLAlchemy does not see the driver's own errors here
        raise DBAPIError.instance(statement, None, error, driver.Error) from error


def _complete(tx: Connection, plan: Plan, job_id: str, written: int, origin: Origin) -> None:
    if written != plan.n_requests:
        raise SpecError(
            f"{plan.spec.name}: dataset", f"{plan.n_requests} requests as counted", f"{written}"
        )
    # The key comes last, with the job itself: a submitter that is killed half way leaves none.
    done = {"planned_at": now(), "idempotency_key": origin.idempotency_key}
    if not tx.execute(update(JobRow).where(JobRow.id == job_id).values(done)).rowcount:
        raise WorkerError("database", f"job {job_id} was removed while it was being planned")
    note(tx, [job_id], SUBMITTED)


def _remove(db: Database, job_id: str) -> None:
    with db.write() as tx:
        tx.execute(delete(JobRow).where(JobRow.id == job_id))
