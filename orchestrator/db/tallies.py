"""A job's sums, kept by triggers: how fast it goes, and the rows of them folded together.

Each transaction adds rows of its own, so that none waits for another; `fold` makes few of many,
and whoever reads sees the same sums before, between and after. Knows nothing of what is counted:
the triggers stand in the migrations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    ScalarSelect,
    Select,
    case,
    cast,
    delete,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
)

from orchestrator.db.columns import now
from orchestrator.db.database import Database
from orchestrator.db.tables import JobRow, TallyRow
from orchestrator.errors import NotFound

BUCKET_SECONDS = 10
WINDOW_SECONDS = 60
_KEPT_SECONDS = 2 * WINDOW_SECONDS
_MOST_ROWS = 16  # more than there are buckets in what is kept
_JOBS_AT_ONCE, _ROWS_AT_ONCE = 100, 5000

_ADDED = (
    *("requests", "queued", "running", "succeeded", "failed", "cancelled"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "replayed_tokens"),
)


@dataclass(frozen=True, slots=True)
class Pace:
    """How a job went over the last minute; None where that is not known.

    `seconds_left` is 0.0 for a job that has ended, and None for one of which nothing ended lately.
    """

    requests_per_second: float | None
    tokens_per_second: float | None
    seconds_left: float | None


def pace(db: Database, job_id: str) -> Pace:
    """Requests ended and tokens generated a second, and how long the rest takes at that pace.

    Raises NotFound.
    """
    with db.read() as rows:
        return pace_seen(rows, job_id)


def pace_seen(rows: Connection, job_id: str) -> Pace:
    """As `pace`, of what this transaction sees."""
    clock = rows.execute(select(now())).scalar_one().timestamp()
    since = int(clock) // BUCKET_SECONDS * BUCKET_SECONDS - WINDOW_SECONDS + BUCKET_SECONDS
    found = rows.execute(_lately(job_id, since)).one()
    if found.left is None:
        raise NotFound("job", job_id)
    if not found.left:
        return Pace(None, None, 0.0)
    started = None if found.started_at is None else found.started_at.timestamp()
    if started is None:
        return Pace(None, None, None)
    seconds = max(1.0, clock - max(since, started))
    ended = max(0, int(found.ended)) / seconds
    left = int(found.left) / ended if ended else None
    return Pace(ended, max(0, int(found.tokens)) / seconds, left)


def tallied(name: str) -> ScalarSelect[int]:
    """A job's sum of this column, for statements that select from `jobs`."""
    total = func.coalesce(func.sum(getattr(TallyRow, name)), 0)
    return select(cast(total, BigInteger)).where(TallyRow.number == JobRow.number).scalar_subquery()


def fold(db: Database) -> int:
    """Add up each job's rows, those of the last two minutes by ten seconds; how many went.

    Any number may do it at once: each takes the rows that no other has taken.
    """
    gone = 0
    with db.read() as rows:
        clock = rows.execute(select(now())).scalar_one()
        old = int(clock.timestamp()) - _KEPT_SECONDS
        numbers = rows.scalars(_many(old)).all()
    for lot in range(0, len(numbers), _JOBS_AT_ONCE):
        with db.write() as tx:
            gone += _fold(tx, numbers[lot : lot + _JOBS_AT_ONCE], old)
    return gone


def _fold(tx: Connection, numbers: Sequence[int], old: int) -> int:
    mine = select(TallyRow.id).where(TallyRow.number.in_(numbers)).limit(_ROWS_AT_ONCE)
    ids = tx.scalars(mine.with_for_update(skip_locked=True)).all()
    # Written out, not bound: PostgreSQL must see that both are the same expression.
    second = case((TallyRow.second < literal_column(str(old)), text("0")), else_=TallyRow.second)
    together = (
        select(
            TallyRow.number,
            second,
            *(func.sum(getattr(TallyRow, name)) for name in _ADDED),
            func.min(TallyRow.started_at),
        )
        .where(TallyRow.id.in_(ids))
        .group_by(TallyRow.number, second)
    )
    names = ["number", "second", *_ADDED, "started_at"]
    made = tx.execute(insert(TallyRow).from_select(names, together)).rowcount
    tx.execute(delete(TallyRow).where(TallyRow.id.in_(ids)))
    return len(ids) - made


def _many(old: int) -> Select[Any]:
    """Numbers of jobs with rows that are old, or more of them than need be."""
    lately = TallyRow.second > 0
    worth = or_(func.min(TallyRow.second) < old, func.count() > _MOST_ROWS)
    many = select(TallyRow.number).where(lately).group_by(TallyRow.number).having(worth)
    # Of a job that is just being made or removed the rows are left alone.
    return select(JobRow.number).where(JobRow.number.in_(many)).order_by(JobRow.number)


def _lately(job_id: str, since: int) -> Select[int, Any, Any, datetime | None]:
    recent = TallyRow.second >= since
    ended = TallyRow.succeeded + TallyRow.failed
    return (
        select(
            func.sum(TallyRow.queued + TallyRow.running).label("left"),
            func.sum(case((recent, ended), else_=0)).label("ended"),
            func.sum(case((recent, TallyRow.completion_tokens), else_=0)).label("tokens"),
            func.min(TallyRow.started_at).label("started_at"),
        )
        .join(JobRow, JobRow.number == TallyRow.number)
        .where(JobRow.id == job_id, JobRow.planned_at.is_not(None))
    )
