"""A job's ended requests in the order in which they ended, also while others still end.

A row may become visible after one that ended later, since its transaction took longer. So nothing
is told from the time since which a transaction has been writing: whoever goes on where they stopped
misses nothing. Knows nothing of what a result is written as.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Select, or_, select, text

from orchestrator.db.columns import now
from orchestrator.db.database import Database
from orchestrator.db.leftovers import has_ended
from orchestrator.db.results import Result, results_by_id
from orchestrator.db.tables import RequestRow
from orchestrator.errors import Conflict, NotFound

PAGE = 50


def finished(
    db: Database, job_id: str, *, after: int | None = None, page: int = PAGE
) -> Iterator[Result]:
    """What has ended by now, those after the request `after` in the order of ending.

    Page by page, a transaction each. Raises NotFound where `after` is no request of the job, and
    Conflict where it has not ended, since it was tried again.
    """
    if after is not None:
        _check_ended(db, job_id, after)
    before = None if has_ended(db, job_id) else _settled(db)
    while ids := _page(db, job_id, after, before, page):
        yield from results_by_id(db, ids)
        after = ids[-1]


def _check_ended(db: Database, job_id: str, after: int) -> None:
    mine = (RequestRow.id == after, RequestRow.job_id == job_id)
    with db.read() as rows:
        found = rows.execute(select(RequestRow.finished_at).where(*mine)).one_or_none()
    if found is None:
        raise NotFound("request", str(after))
    if found.finished_at is None:
        raise Conflict("request", str(after), "it has not ended: it was tried again")


def _page(
    db: Database, job_id: str, after: int | None, before: datetime | None, page: int
) -> Sequence[int]:
    wanted = select(RequestRow.id).where(
        RequestRow.job_id == job_id, RequestRow.finished_at.is_not(None)
    )
    if before is not None:
        wanted = wanted.where(RequestRow.finished_at < before)
    if after is not None:
        wanted = _beyond(wanted, after)
    with db.read() as rows:
        return rows.scalars(
            wanted.order_by(RequestRow.finished_at, RequestRow.id).limit(page)
        ).all()


def _beyond(wanted: Select[int], after: int) -> Select[int]:
    # Compared with what is stored, not with what was read: SQLite compares texts.
    last = RequestRow.__table__.alias("last")
    at = select(last.c.finished_at).where(last.c.id == after).scalar_subquery()
    return wanted.where(
        RequestRow.finished_at >= at, or_(RequestRow.finished_at > at, RequestRow.id > after)
    )


def _settled(db: Database) -> datetime:
    """Before this instant nothing more will be found to have ended."""
    if db.dialect == "sqlite":
        with db.write() as tx:  # no one else is writing
            clock = tx.execute(select(now())).scalar_one()
        # Its clock has milliseconds, and what is bound has more digits.
        return clock - timedelta(microseconds=1)
    with db.read() as rows:
        clock = rows.execute(select(now())).scalar_one()
        since = rows.execute(text(_WRITING_SINCE)).scalar_one()
    return min(clock - _UNSEEN, since or clock)


_UNSEEN = timedelta(milliseconds=100)
"""Between reading the clock and being seen as writing, in one statement, there is less."""

_WRITING_SINCE = (
    "SELECT min(xact_start) FROM pg_stat_activity"
    " WHERE datname = current_database() AND backend_xid IS NOT NULL"
)
