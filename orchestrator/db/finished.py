"""A job's ended requests in the order in which they ended, also while others still end.

A row may become visible after one that ended later, since its transaction took longer. So nothing
is told from the time since which a transaction has been writing: whoever goes on where they stopped
misses nothing. Knows nothing of what a result is written as.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Select, String, literal, or_, select, text, type_coerce
from sqlalchemy.sql.elements import ColumnElement

from orchestrator.db.columns import Instant, now
from orchestrator.db.database import Database
from orchestrator.db.leftovers import has_ended
from orchestrator.db.results import Result, results_by_id
from orchestrator.db.tables import CANCELLED, FAILED, SUCCEEDED, RequestRow
from orchestrator.errors import Conflict, NotFound

PAGE = 50
_ENDED = (SUCCEEDED, FAILED, CANCELLED)


@dataclass(frozen=True, slots=True)
class Place:
    """How far a job's results are read: the last request, and when it ended, as it is stored.

    Of its own, not of the row: a request that is tried again meanwhile has not ended any more.
    """

    at: datetime | str
    request_id: int


def place_of(db: Database, job_id: str, after: int | None) -> Place | None:
    """Where the request `after` stands; None before the first.

    Raises NotFound where it is no request of the job, and Conflict where it has not ended, since
    it was tried again.
    """
    if after is None:
        return None
    mine = (RequestRow.id == after, RequestRow.job_id == job_id)
    with db.read() as rows:
        found = rows.execute(select(_stored(db)).where(*mine)).one_or_none()
    if found is None:
        raise NotFound("request", str(after))
    if found[0] is None:
        raise Conflict("request", str(after), "it has not ended: it was tried again")
    return Place(found[0], after)


def pages(
    db: Database, job_id: str, last: Place | None, *, over: bool, page: int = PAGE
) -> Iterator[tuple[list[Result], Place]]:
    """What has ended by now after that place, in the order of ending, and the place behind it.

    `over`: every request of the job had ended before, so that nothing is waited for. A transaction
    a page; one whose requests are all tried again meanwhile is empty.
    """
    before = None if over else _settled(db)
    while found := _page(db, job_id, last, before, page):
        last = found[-1]
        results = results_by_id(db, [each.request_id for each in found])
        yield [each for each in results if each.state in _ENDED], last


def finished(
    db: Database, job_id: str, *, after: int | None = None, page: int = PAGE
) -> Iterator[Result]:
    """What has ended by now, those after the request `after`. Raises as `place_of` does."""
    last, over = place_of(db, job_id, after), has_ended(db, job_id)
    for results, _ in pages(db, job_id, last, over=over, page=page):
        yield from results


def _page(
    db: Database, job_id: str, last: Place | None, before: datetime | None, page: int
) -> list[Place]:
    at = _stored(db)
    wanted = select(at, RequestRow.id).where(
        RequestRow.job_id == job_id, RequestRow.finished_at.is_not(None)
    )
    if before is not None:
        wanted = wanted.where(RequestRow.finished_at < before)
    if last is not None:
        wanted = _beyond(wanted, at, last)
    with db.read() as rows:
        found = rows.execute(wanted.order_by(RequestRow.finished_at, RequestRow.id).limit(page))
        return [Place(*row) for row in found]


def _beyond(
    wanted: Select[datetime | str, int], at: ColumnElement[datetime | str], last: Place
) -> Select[datetime | str, int]:
    known = literal(last.at, at.type)
    return wanted.where(at >= known, or_(at > known, RequestRow.id > last.request_id))


def _stored(db: Database) -> ColumnElement[datetime | str]:
    """When a request ended, to be compared: SQLite compares texts, and a bound time is another."""
    at = RequestRow.finished_at
    return type_coerce(at, String if db.dialect == "sqlite" else Instant)


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
