"""Requests of a job, page by page, one of them, and what went wrong with them, by error.

A page costs the same wherever it stands and whatever it is filtered by: of the filters given the
one with an index of its own chooses, in order of id, and the others look at what it chose. Knows
nothing of what completions hold (`results.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, exists, func, select, union

from orchestrator.db.database import Database
from orchestrator.db.tables import (
    ROWS_PER_JOB,
    ChoiceRow,
    ItemRow,
    JobRow,
    PointRow,
    RequestRow,
)
from orchestrator.errors import NotFound

_LOOK = 500


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """One request and where it stands; `n_tokens` is summed over its choices.

    A queued one with an error had it in its last attempt; it is tried again from `retry_at` on.
    """

    id: int
    job_id: str
    state: str
    epoch: int
    attempt: int
    idle_attempts: int
    seed: int
    n: int
    n_tokens: int
    item_position: int
    custom_id: str
    point_position: int
    worker_id: str | None
    error_code: str | None
    error_message: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    retry_at: datetime | None = None
    failures: int = 0


@dataclass(frozen=True, slots=True)
class ErrorGroup:
    """Requests whose last attempt ended in one code; `message` is that of `request_id`."""

    code: str
    count: int
    message: str | None
    request_id: int


def request(db: Database, request_id: int, *, owner: str | None = None) -> RequestStatus:
    """One request, of any job or of those of `owner`. Raises NotFound."""
    wanted = (
        _request_status()
        .join(JobRow, JobRow.id == RequestRow.job_id)
        .where(RequestRow.id == request_id, JobRow.planned_at.is_not(None))
    )
    if owner is not None:
        wanted = wanted.where(JobRow.owner == owner)
    with db.read() as rows:
        row = rows.execute(wanted).one_or_none()
    if row is None:
        raise NotFound("request", str(request_id))
    return RequestStatus(*row)


def requests(
    db: Database,
    job_id: str,
    *,
    states: Sequence[str] = (),
    finish_reasons: Sequence[str] = (),
    error_codes: Sequence[str] = (),
    points: Sequence[int] = (),
    after: int = -1,
    limit: int = 100,
) -> list[RequestStatus]:
    """The job's requests in order of id, those after the id `after`; all where nothing is asked.

    Of these states, with a choice that ended for one of these reasons, with one of these error
    codes, at one of these positions of points. Empty for a job that does not exist.
    """
    with db.read() as rows:
        number = rows.scalar(select(JobRow.number).where(JobRow.id == job_id))
    if number is None:
        return []
    job = _Filtered(job_id, number, states, finish_reasons, error_codes, points)
    found: list[RequestStatus] = []
    look = limit if job.filters < 2 else max(limit, _LOOK)
    while len(found) < limit:
        with db.read() as rows:
            ids = rows.scalars(job.ids(after, look)).all()
            chosen = _request_status().where(RequestRow.id.in_(ids), *job.conditions())
            if ids:
                found += [
                    RequestStatus(*row) for row in rows.execute(chosen.order_by(RequestRow.id))
                ]
        if len(ids) < look:
            break
        after = ids[-1]
    return found[:limit]


def errors(db: Database, job_id: str) -> list[ErrorGroup]:
    """The job's errors by code, the most frequent first; those that are tried again counted too."""
    failed = RequestRow.error_code.is_not(None)
    groups = (
        select(
            RequestRow.error_code.label("code"),
            func.count().label("count"),
            func.min(RequestRow.id).label("first"),
        )
        .where(RequestRow.job_id == job_id, failed)
        .group_by(RequestRow.error_code)
        .subquery()
    )
    wanted = (
        select(groups.c.code, groups.c.count, RequestRow.error_message, groups.c.first)
        .join(RequestRow, RequestRow.id == groups.c.first)
        .order_by(groups.c.count.desc(), groups.c.code)
    )
    with db.read() as rows:
        return [ErrorGroup(*row) for row in rows.execute(wanted)]


@dataclass(frozen=True, slots=True)
class _Filtered:
    """A job and what of its requests is wanted."""

    job_id: str
    number: int
    states: Sequence[str]
    finish_reasons: Sequence[str]
    error_codes: Sequence[str]
    points: Sequence[int]

    @property
    def filters(self) -> int:
        return sum(map(bool, (self.states, self.finish_reasons, self.error_codes, self.points)))

    def ids(self, after: int, limit: int) -> Select[Any]:
        """The next ids by the filter that leaves the fewest, each value by its index."""
        first = self.number * ROWS_PER_JOB
        after, end = max(after, first - 1), first + ROWS_PER_JOB
        values, condition = self._choosing()
        column = ChoiceRow.request_id if values is self.finish_reasons else RequestRow.id
        pages = [
            select(column.label("id"))
            .where(column > after, column < end, condition(value))
            .distinct()
            .order_by(column)
            .limit(limit)
            .subquery()
            for value in values
        ]
        if not pages:
            inside = (RequestRow.id > after, RequestRow.id < end)
            return select(RequestRow.id).where(*inside).order_by(RequestRow.id).limit(limit)
        all_ids = union(*(select(page.c.id) for page in pages)).subquery()
        return select(all_ids.c.id).order_by(all_ids.c.id).limit(limit)

    def _choosing(self) -> tuple[Sequence[Any], Callable[[Any], ColumnElement[bool]]]:
        mine = RequestRow.job_id == self.job_id
        if self.error_codes:
            return self.error_codes, lambda code: mine & (RequestRow.error_code == code)
        if self.points:
            return self.points, lambda at: RequestRow.point_id == self.number * ROWS_PER_JOB + at
        if self.finish_reasons:
            return self.finish_reasons, lambda reason: ChoiceRow.finish_reason == reason
        return self.states, lambda state: mine & (RequestRow.state == state)

    def conditions(self) -> list[ColumnElement[bool]]:
        """All that is asked, of a request that is found by its id."""
        first = self.number * ROWS_PER_JOB
        asked: list[ColumnElement[bool]] = []
        if self.states:
            asked.append(RequestRow.state.in_(self.states))
        if self.error_codes:
            asked.append(RequestRow.error_code.in_(self.error_codes))
        if self.points:
            asked.append(RequestRow.point_id.in_([first + at for at in self.points]))
        if self.finish_reasons:
            reasons = ChoiceRow.finish_reason.in_(self.finish_reasons)
            asked.append(exists().where(ChoiceRow.request_id == RequestRow.id, reasons))
        return asked


def _request_status() -> Select[Any]:
    n_tokens = (
        select(func.coalesce(func.sum(ChoiceRow.n_tokens), 0))
        .where(ChoiceRow.request_id == RequestRow.id)
        .scalar_subquery()
    )
    elsewhere = {
        "n_tokens": n_tokens,
        "item_position": ItemRow.position,
        "custom_id": ItemRow.custom_id,
        "point_position": PointRow.position,
    }
    columns = (
        elsewhere[name] if name in elsewhere else getattr(RequestRow, name)
        for name in RequestStatus.__dataclass_fields__
    )
    return (
        select(*columns)
        .join(ItemRow, ItemRow.id == RequestRow.item_id)
        .join(PointRow, PointRow.id == RequestRow.point_id)
    )
