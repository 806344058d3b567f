"""The rows of batches, one function per transition; a batch's state is read off its times.

Every transition asks for the state it starts from, so that of two who work on a batch one changes
it and the other finds it changed: the lease saves double work, no more. Knows nothing of files'
bytes, nor of what stands in a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, and_, exists, func, insert, or_, select, text, update

from orchestrator.db.columns import now, seconds_from_now
from orchestrator.db.database import Database
from orchestrator.db.files import NewFile, enter, lock_file
from orchestrator.db.tables import OPEN_BATCH, QUEUED, RUNNING, BatchRow, JobRow, RequestRow
from orchestrator.errors import Conflict, NotFound

COMPLETED, EXPIRED, CANCELLED = "completed", "expired", "cancelled"
VALIDATING, FAILED, IN_PROGRESS = "validating", "failed", "in_progress"
FINALIZING, CANCELLING = "finalizing", "cancelling"
_ENDS = (
    (FAILED, "failed_at"),
    (COMPLETED, "completed_at"),
    (EXPIRED, "expired_at"),
    (CANCELLED, "cancelled_at"),
)
_ON_THE_WAY = (
    (CANCELLING, "cancelling_at"),
    (FINALIZING, "finalizing_at"),
    (IN_PROGRESS, "in_progress_at"),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch; `lines` is 0 until it is validated, `errors` {code, message, param, line} each."""

    id: str
    owner: str
    job_id: str | None
    endpoint: str
    model: str | None
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    completion_window: str
    output_expires_seconds: int | None
    lines: int
    created_at: datetime
    expires_at: datetime
    in_progress_at: datetime | None
    finalizing_at: datetime | None
    completed_at: datetime | None
    failed_at: datetime | None
    expired_at: datetime | None
    cancelling_at: datetime | None
    cancelled_at: datetime | None
    errors: Sequence[Mapping[str, object]] | None
    details: Mapping[str, str] | None

    @property
    def status(self) -> str:
        """As the API names it."""
        for name, column in (*_ENDS, *_ON_THE_WAY):
            if getattr(self, column) is not None:
                return name
        return VALIDATING

    @property
    def ended(self) -> bool:
        """Nothing of it changes any more."""
        return any(getattr(self, column) is not None for _, column in _ENDS)


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch as it is asked for; `window_seconds` and `output_expires_seconds` count from its
    making and its end."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    window_seconds: int
    output_expires_seconds: int | None = None
    details: Mapping[str, str] | None = None


def insert_batch(db: Database, new: NewBatch, *, sees: str | None) -> Batch:
    """Enter a batch that waits to be validated.

    Raises NotFound when there is no such file, or none that `sees` (None: everybody's) may see.
    """
    with db.write() as tx:
        lock_file(tx, new.input_file_id, sees)
        created = tx.scalars(select(now())).one()
        tx.execute(
            insert(BatchRow).values(
                id=new.id,
                owner=new.owner,
                endpoint=new.endpoint,
                input_file_id=new.input_file_id,
                completion_window=new.completion_window,
                output_expires_seconds=new.output_expires_seconds,
                created_at=created,
                expires_at=created + timedelta(seconds=new.window_seconds),
                details=dict(new.details) if new.details is not None else None,
            )
        )
    return batch(db, new.id)


def batch(db: Database, batch_id: str, *, owner: str | None = None) -> Batch:
    """One batch, of that owner alone (None: of anybody). Raises NotFound."""
    with db.read() as rows:
        row = rows.execute(_batches(owner).where(BatchRow.id == batch_id)).one_or_none()
    if row is None:
        raise NotFound("batch", batch_id)
    return Batch(*row)


def batches_page(
    db: Database, *, owner: str | None = None, after: str | None = None, limit: int = 20
) -> list[Batch]:
    """The newest batches first, those older than the batch `after`.

    Raises NotFound when there is no such batch `after`.
    """
    wanted = _batches(owner)
    if after is not None:
        last = batch(db, after, owner=owner)
        same = and_(BatchRow.created_at == last.created_at, BatchRow.id < last.id)
        wanted = wanted.where(or_(BatchRow.created_at < last.created_at, same))
    wanted = wanted.order_by(BatchRow.created_at.desc(), BatchRow.id.desc()).limit(limit)
    with db.read() as rows:
        return [Batch(*row) for row in rows.execute(wanted)]


def cancel_batch(db: Database, batch_id: str, *, owner: str | None = None) -> Batch:
    """It is to be cancelled, or is being cancelled already.

    Raises NotFound, Conflict when it has ended or its files are being written.
    """
    with db.write() as tx:
        wanted = _batches(owner).where(BatchRow.id == batch_id).with_for_update()
        row = tx.execute(wanted).one_or_none()
        if row is None:
            raise NotFound("batch", batch_id)
        found = Batch(*row)
        if found.ended or found.status == FINALIZING:
            raise Conflict("batch", batch_id, f"it is {found.status} and cannot be cancelled")
        cancelling = func.coalesce(BatchRow.cancelling_at, now())
        tx.execute(update(BatchRow).where(BatchRow.id == batch_id).values(cancelling_at=cancelling))
    return batch(db, batch_id)


def due_batches(db: Database) -> list[str]:
    """Ids of the batches that have something to be done and that nobody has leased, oldest first.

    To validate, to cancel, or ended and without their files.
    """
    over = and_(~_has(QUEUED), ~_has(RUNNING))
    uncancelled = exists().where(JobRow.id == BatchRow.job_id, JobRow.cancelled_at.is_(None))
    wanted = (
        select(BatchRow.id)
        .where(
            text(OPEN_BATCH),
            _unleased(),
            or_(
                BatchRow.job_id.is_(None),
                over,
                and_(BatchRow.cancelling_at.is_not(None), uncancelled),
            ),
        )
        .order_by(BatchRow.created_at)
    )
    with db.read() as rows:
        return list(rows.scalars(wanted))


def lease_batch(db: Database, batch_id: str, seconds: float) -> Batch | None:
    """The batch, kept from others for so long; None when it has ended or somebody has it."""
    with db.write() as tx:
        leased = tx.execute(
            update(BatchRow)
            .where(BatchRow.id == batch_id, text(OPEN_BATCH), _unleased())
            .values(leased_until=seconds_from_now(seconds))
        ).rowcount
    return batch(db, batch_id) if leased else None


def renew_batch(db: Database, batch_id: str, seconds: float) -> None:
    """Keep it for so long from now on."""
    _update(db, batch_id, leased_until=seconds_from_now(seconds))


def unlease_batch(db: Database, batch_id: str) -> None:
    """Others may have it."""
    _update(db, batch_id, leased_until=None)


def begin_batch(db: Database, batch_id: str, *, job_id: str, model: str, lines: int) -> None:
    """Its lines are requests of the job; nothing happens if they are already."""
    with db.write() as tx:
        tx.execute(
            update(BatchRow)
            .where(BatchRow.id == batch_id, BatchRow.job_id.is_(None), text(OPEN_BATCH))
            .values(job_id=job_id, model=model, lines=lines, in_progress_at=now())
        )


def fail_batch(db: Database, batch_id: str, errors: Sequence[Mapping[str, object]]) -> None:
    """Its lines cannot be run, and none of them was."""
    with db.write() as tx:
        tx.execute(
            update(BatchRow)
            .where(BatchRow.id == batch_id, BatchRow.job_id.is_(None), text(OPEN_BATCH))
            .values(failed_at=now(), errors=[dict(error) for error in errors])
        )


def finalize_batch(db: Database, batch_id: str) -> None:
    """Its requests have ended and its files are being written."""
    with db.write() as tx:
        tx.execute(
            update(BatchRow)
            .where(BatchRow.id == batch_id, text(OPEN_BATCH))
            .values(finalizing_at=func.coalesce(BatchRow.finalizing_at, now()))
        )


def end_batch(
    db: Database,
    batch_id: str,
    how: str,
    *,
    output: NewFile | None = None,
    errors: NewFile | None = None,
) -> bool:
    """It is `completed`, `expired` or `cancelled`, with the files whose bytes are whole on disk.

    False, and nothing written, when it had ended already: the bytes are nobody's then.
    """
    with db.write() as tx:
        ended = tx.execute(
            update(BatchRow)
            .where(BatchRow.id == batch_id, text(OPEN_BATCH))
            .values(
                output_file_id=output.id if output else None,
                error_file_id=errors.id if errors else None,
                leased_until=None,
                **{dict(_ENDS)[how]: now()},
            )
        ).rowcount
        for new in (output, errors):
            if ended and new:
                enter(tx, new)
    return bool(ended)


def job_of_batch(db: Database, batch: Batch) -> tuple[str, str, int] | None:
    """(id, model, requests) of the job that was submitted for the batch, if there is one."""
    wanted = select(JobRow.id, JobRow.model, JobRow.n_requests).where(
        JobRow.owner == batch.owner,
        JobRow.idempotency_key == batch.id,
        JobRow.planned_at.is_not(None),
    )
    with db.read() as rows:
        row = rows.execute(wanted).one_or_none()
    return None if row is None else (row.id, row.model, row.n_requests)


def _batches(owner: str | None) -> Select[Any]:
    names = Batch.__dataclass_fields__
    wanted = select(*(getattr(BatchRow, name) for name in names))
    return wanted if owner is None else wanted.where(BatchRow.owner == owner)


def _unleased() -> Any:
    return or_(
        BatchRow.leased_until.is_(None),
        BatchRow.leased_until < select(now()).scalar_subquery(),
    )


def _has(state: str) -> Any:
    return exists().where(RequestRow.job_id == BatchRow.job_id, RequestRow.state == state)


def _update(db: Database, batch_id: str, **values: object) -> None:
    with db.write() as tx:
        tx.execute(update(BatchRow).where(BatchRow.id == batch_id).values(**values))
