"""How requests come back: given up on purpose, after an error, or left behind by the dead.

What comes back to a cancelled job is cancelled, everything else is queued again with its tokens,
or has failed after too many errors. Knows nothing of why a worker let go.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    Connection,
    ScalarSelect,
    Text,
    and_,
    bindparam,
    case,
    cast,
    null,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.elements import ColumnElement

from orchestrator.db.columns import Words, now, seconds_from_now
from orchestrator.db.database import Database
from orchestrator.db.tables import CANCELLED, FAILED, QUEUED, JobRow, RequestRow, WorkerRow

UNSEEN_SECONDS = 60.0
MAX_DELAY_SECONDS = 300
DEADLINE = "deadline"
LATE = "it had not ended by the job's deadline"
_RUNNING = text("requests.state = 'running'")  # SQLite uses the index only for these very words


def release(
    db: Database,
    claims: Iterable[tuple[int, int]],
    *,
    error: tuple[str, str] | None = None,
    delay: bool = False,
) -> int:
    """Give back (request_id, epoch) pairs; return how many were still held.

    Without an `error` it is on purpose: the attempt does not count as an idle one. Requests of a
    cancelled job become cancelled.

    `error`, code and message, says that the machine failed, not the request: `failures` counts
    it, and the `max_attempts`-th in a row without a new token fails the request with the code
    `worker_error`. The attempt does not count towards poison, yet without a new token the request
    stays a suspect. With `delay` it waits 2^failures s, MAX_DELAY_SECONDS at most.
    """
    pairs = list(claims)
    if not pairs:
        return 0
    held = tuple_(RequestRow.id, RequestRow.epoch).in_(pairs)
    idle = RequestRow.idle_attempts
    least = 0 if error is None else 1
    kept = case((idle > least, idle - 1), else_=idle)
    with db.write() as tx:
        return _send_back(tx, held, idle_attempts=kept, error=error, delay=delay)


def excuse(db: Database, worker_id: str, claims: Iterable[tuple[int, int]]) -> None:
    """A worker that was cut off from the database is back: its attempts are nobody's fault.

    What it held, (request_id, epoch) pairs, or claimed without hearing of it comes back as by
    `release`; where others hold it by now, one of the idle attempts counts as `excused`.
    """
    idle = RequestRow.idle_attempts
    fewer = case((idle > 0, idle - 1), else_=idle)
    if pairs := dict(claims):
        among = RequestRow.id.in_(pairs)
        held, epoch = update(RequestRow).where(among), case(pairs, value=RequestRow.id)
        ours = held.where(RequestRow.epoch == epoch, RequestRow.state == QUEUED)
        theirs = held.where(RequestRow.epoch > epoch, RequestRow.finished_at.is_(None), idle > 0)
        with db.write() as tx:
            tx.execute(select(RequestRow.id).where(among).order_by(RequestRow.id).with_for_update())
            tx.execute(ours.values(idle_attempts=fewer))
            tx.execute(theirs.values(excused=RequestRow.excused + 1))
    with db.write() as tx:
        _send_back(tx, RequestRow.worker_id == worker_id, idle_attempts=fewer)


def release_expired(db: Database) -> int:
    """Give back what no worker renewed in time; return how many requests."""
    with db.write() as tx:
        return _send_back(tx, RequestRow.leased_until < select(now()).scalar_subquery())


def release_worker(db: Database, worker_id: str) -> int:
    """Give back what a worker known to be dead held; return how many requests."""
    with db.write() as tx:
        return _send_back(tx, RequestRow.worker_id == worker_id)


def forget_workers(db: Database, *, unseen_seconds: float = UNSEEN_SECONDS) -> list[str]:
    """Those not seen for so long count as stopped, and what they held comes back; their ids.

    One that was only asleep is a worker again as soon as it shows itself.
    """
    unseen = (
        update(WorkerRow)
        .where(
            WorkerRow.stopped_at.is_(None),
            WorkerRow.seen_at < seconds_from_now(-unseen_seconds),
        )
        .values(stopped_at=now())
        .returning(WorkerRow.id)
    )
    with db.write() as tx:
        forgotten = list(tx.scalars(unseen))
        if forgotten:
            _send_back(tx, RequestRow.worker_id.in_(forgotten))
    return forgotten


def _send_back(
    tx: Connection,
    where: ColumnElement[bool],
    *,
    idle_attempts: ColumnElement[int] | None = None,
    error: tuple[str, str] | None = None,
    delay: bool = False,
) -> int:
    """running -> queued, cancelled where the job is, or failed; return how many requests."""
    jobs = select(RequestRow.job_id).where(_RUNNING, where)
    # Either the cancellation is seen here, or it waits and then sees these requests queued.
    lock = select(JobRow.id).where(JobRow.id.in_(jobs)).order_by(JobRow.id)
    if not tx.execute(lock.with_for_update(read=True)).all():
        return 0
    back = update(RequestRow).where(_RUNNING, where).values(leased_until=None)
    if idle_attempts is not None:
        back = back.values(idle_attempts=idle_attempts)
    failures = RequestRow.failures + (0 if error is None else 1)
    # In the order in which a flush locks them: neither waits for the other in a circle.
    held = select(RequestRow.id).where(_RUNNING, where).order_by(RequestRow.id)
    tx.execute(held.with_for_update()).all()
    later = _later(failures) if delay else None
    back = back.values(failures=failures, **_end(failures, error, later))
    return tx.execute(back).rowcount


def _end(
    failures: ColumnElement[int], error: tuple[str, str] | None, later: ColumnElement[Any] | None
) -> dict[str, Any]:
    """state, times and error of what comes back; `later`: when to try again."""
    late = and_(_GONE, _of_job(JobRow.cancel_reason) == DEADLINE)
    state: list[Any] = [(_GONE, CANCELLED)]
    code: list[Any] = [(late, DEADLINE), (_GONE, null())]
    message: list[Any] = [(late, LATE), (_GONE, null())]
    last: tuple[Any, Any] = (RequestRow.error_code, RequestRow.error_message)
    if error is not None:
        over = failures >= _of_job(JobRow.max_attempts)
        state.append((over, FAILED))
        code.append((over, "worker_error"))
        said = f" attempts in a row ended in an error, the last: {error[0]}: {error[1]}"
        message.append((over, cast(failures, Text) + bindparam(None, said, type_=Words)))
        last = (error[0], bindparam(None, error[1], type_=Words))
    ended = or_(*(condition for condition, _ in state))
    return {
        "state": case(*state, else_=QUEUED),
        "finished_at": case((ended, now()), else_=None),
        "retry_at": None if later is None else case((ended, null()), else_=later),
        "error_code": case(*code, else_=last[0]),
        "error_message": case(*message, else_=last[1]),
    }


def _later(failures: ColumnElement[int]) -> seconds_from_now:
    """2^failures seconds from now, MAX_DELAY_SECONDS at most."""
    steps = range(MAX_DELAY_SECONDS.bit_length())
    delays = [(failures == n, min(2**n, MAX_DELAY_SECONDS)) for n in steps]
    return seconds_from_now(case(*delays, else_=MAX_DELAY_SECONDS))


def _of_job(column: InstrumentedAttribute[Any]) -> ScalarSelect[Any]:
    return select(column).where(JobRow.id == RequestRow.job_id).scalar_subquery()


_GONE = _of_job(JobRow.cancelled_at).is_not(None)
