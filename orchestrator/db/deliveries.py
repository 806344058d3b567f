"""Webhooks of jobs that have ended: made once, claimed under a lease, settled.

Whoever claims one holds it until its lease is over; what was claimed and not settled is due again
then, so that a sender may be killed at any point: each is sent at least once. Knows nothing of
HTTP, nor of when a next attempt is worth while.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, TextClause, Update, select, text, update

from orchestrator.db.columns import now, seconds_from_now
from orchestrator.db.database import Database
from orchestrator.db.tables import UNANNOUNCED, DeliveryRow, JobRow


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook to be sent now: `attempt` counts from 1 and is the fence of whoever sends it."""

    id: int
    job_id: str
    attempt: int
    webhook: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True, slots=True)
class DeliveryStatus:
    """Where a job's webhook stands; `next_at` is None once it was taken or given up."""

    job_id: str
    attempts: int
    created_at: datetime
    next_at: datetime | None
    delivered_at: datetime | None
    failed_at: datetime | None
    last_status: int | None
    last_error: str | None


def announce(db: Database) -> int:
    """Make the deliveries of jobs that have ended, are graded and have none; how many.

    Any number may do so at once: a job has one delivery at most, whatever becomes of the job later.
    """
    with db.read() as rows:  # looked at often, and seldom true: no writer is kept waiting
        if rows.scalar(select(JobRow.id).where(*_unannounced()).limit(1)) is None:
            return 0
    with db.write() as tx:
        ids = tx.scalars(select(JobRow.id).where(*_unannounced())).all()
        made = sum(tx.execute(_ANNOUNCE, {"job_id": job_id}).rowcount for job_id in ids)
        tx.execute(update(JobRow).where(JobRow.id.in_(ids)).values(announced_at=now()))
    return made


def claim_due(db: Database, *, limit: int, lease_seconds: float) -> list[Delivery]:
    """Take what is due, longest due first; nobody else is given it before the lease is over."""
    due = (
        select(DeliveryRow.id)
        .where(DeliveryRow.next_at <= select(now()).scalar_subquery())
        .order_by(DeliveryRow.next_at)
        .limit(limit)
    )
    with db.read() as rows:
        if not rows.scalars(due).all():
            return []
    with db.write() as tx:
        ids = tx.scalars(due.with_for_update(skip_locked=True)).all()
        tx.execute(
            update(DeliveryRow)
            .where(DeliveryRow.id.in_(ids))
            .values(attempts=DeliveryRow.attempts + 1, next_at=seconds_from_now(lease_seconds))
        )
        found = tx.execute(
            select(DeliveryRow.id, DeliveryRow.job_id, DeliveryRow.attempts, JobRow.webhook)
            .join(JobRow, JobRow.id == DeliveryRow.job_id)
            .where(DeliveryRow.id.in_(ids))
            .order_by(DeliveryRow.id)
        ).all()
    return [Delivery(row.id, row.job_id, row.attempts, row.webhook or {}) for row in found]


def delivered(db: Database, delivery: Delivery, status: int) -> None:
    """It was taken: sent no more, even where another sender has it by now."""
    with db.write() as tx:
        tx.execute(
            update(DeliveryRow)
            .where(DeliveryRow.id == delivery.id)
            .values(
                delivered_at=now(),
                next_at=None,
                failed_at=None,
                last_status=status,
                last_error=None,
            )
        )


def postpone(
    db: Database, delivery: Delivery, seconds: float, *, status: int | None, error: str
) -> None:
    """It was not taken: due again in `seconds`. Nothing happens if somebody else has it by now."""
    with db.write() as tx:
        tx.execute(
            _mine(delivery).values(
                next_at=seconds_from_now(seconds), last_status=status, last_error=error
            )
        )


def give_up(db: Database, delivery: Delivery, *, status: int | None, error: str) -> None:
    """It was not taken, and is sent no more. Nothing happens if somebody else has it by now."""
    with db.write() as tx:
        tx.execute(
            _mine(delivery).values(
                next_at=None, failed_at=now(), last_status=status, last_error=error
            )
        )


def delivery_status(db: Database, job_id: str) -> DeliveryStatus | None:
    """Where the job's webhook stands; None before the job has ended, or where it has none."""
    columns = [getattr(DeliveryRow, name) for name in DeliveryStatus.__dataclass_fields__]
    with db.read() as rows:
        row = rows.execute(select(*columns).where(DeliveryRow.job_id == job_id)).one_or_none()
    return None if row is None else DeliveryStatus(*row)


_ANNOUNCE = text("INSERT INTO deliveries (job_id) VALUES (:job_id) ON CONFLICT (job_id) DO NOTHING")


def _unannounced() -> tuple[TextClause, ColumnElement[bool]]:
    # By the index of these words, which a job leaves when its delivery is made.
    return text(UNANNOUNCED), JobRow.graded_at.is_not(None)


def _mine(delivery: Delivery) -> Update:
    return update(DeliveryRow).where(
        DeliveryRow.id == delivery.id,
        DeliveryRow.attempts == delivery.attempt,
        DeliveryRow.delivered_at.is_(None),
    )
