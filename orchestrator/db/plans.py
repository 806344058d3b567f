"""A plan -> rows in bulk: COPY on PostgreSQL, executemany on SQLite, a thousand requests at once.

Each batch is its own transaction, so that running workers can flush in between; `planned_at`, set
in the last one, is what makes the job claimable and visible. Knows nothing of YAML or datasets: it
reads the plan's values as they stream by and keeps one batch of them.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.sql.elements import ColumnElement

from orchestrator.db.database import Database
from orchestrator.db.tables import (
    ROWS_PER_JOB,
    JobRow,
    TurnRow,
    now,
    seconds_from_now,
    storable,
    to_json,
)
from orchestrator.errors import SpecError, WorkerError

if TYPE_CHECKING:
    from orchestrator.spec.limits import Limits
    from orchestrator.spec.plan import Plan, PlannedRequest

BATCH = 1000
ABANDONED_SECONDS = 24 * 3600
_NUMBER_LOCK = 0x6A6F626E756D6272


def insert_job(db: Database, plan: Plan) -> str:
    """Write a job with all its points, items, requests and choices; return its id.

    Until the last transaction the job is neither claimable nor visible. Interrupted by an error,
    its rows are removed again; killed, they stay invisible until a later call removes them.
    Raises SpecError when two items have the same custom_id or the dataset is not the one that was
    planned any more, WorkerError when the database cannot.
    """
    remove_unplanned(db)
    job_id = new_job_id()
    try:
        first = _insert_job_row(db, plan, job_id) * ROWS_PER_JOB
        with db.write() as tx:
            points = (
                (first + p.position, job_id, p.position, to_json(p.params)) for p in plan.points
            )
            _insert(tx, "points", ("id", "job_id", "position", "params"), points)
        written = 0
        requests = iter(plan.requests())
        while batch := list(islice(requests, BATCH)):
            _insert_batch(db, plan, job_id, first, batch)
            written += len(batch)
        _complete(db, plan, job_id, written)
    except BaseException:
        # Also on Ctrl-C. A database that is gone keeps the rows, invisible.
        with contextlib.suppress(Exception):
            _remove(db, job_id)
        raise
    return job_id


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


def _insert_job_row(db: Database, plan: Plan, job_id: str) -> int:
    """The new job's number."""
    spec = plan.spec
    with db.write() as tx:
        if db.dialect == "postgresql":
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
            )
        )
        tx.execute(insert(TurnRow).values(job_id=job_id))
    return number


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
    db: Database, plan: Plan, job_id: str, first: int, batch: Sequence[PlannedRequest]
) -> None:
    # Requests come item by item: an item is new where its first point is.
    points = len(plan.points)
    items = [r.item for r in batch if r.position % points == 0]
    try:
        with db.write() as tx:
            _insert(
                tx,
                "items",
                ("id", "job_id", "position", "custom_id", "columns"),
                (
                    (
                        first + item.position,
                        job_id,
                        item.position,
                        storable(item.custom_id, db.dialect),
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
                        r.user if r.user is None else storable(r.user, db.dialect),
                    )
                    for r in batch
                ),
            )
            _insert(
                tx,
                "choices",
                ("request_id", "choice"),
                ((first + r.position, choice) for r in batch for choice in range(r.n)),
            )
    except IntegrityError as error:
        if "custom_id" not in str(error.orig):
            raise
        raise SpecError(
            f"{plan.spec.name}: dataset", "a custom_id of its own for every item", "one twice"
        ) from error


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


def _complete(db: Database, plan: Plan, job_id: str, written: int) -> None:
    if written != plan.n_requests:
        raise SpecError(
            f"{plan.spec.name}: dataset", f"{plan.n_requests} requests as counted", f"{written}"
        )
    with db.write() as tx:
        if not tx.execute(
            update(JobRow).where(JobRow.id == job_id).values(planned_at=now())
        ).rowcount:
            raise WorkerError("database", f"job {job_id} was removed while it was being planned")


def _remove(db: Database, job_id: str) -> None:
    with db.write() as tx:
        tx.execute(delete(JobRow).where(JobRow.id == job_id))
