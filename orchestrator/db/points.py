"""How each point of a sweep fares: its requests by state, its tokens, its scores.

Knows nothing of means or errors (`orchestrator.evaluation.statistics`) nor of tables as drawn.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, func, select
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.elements import ColumnElement

from orchestrator.db.database import Database
from orchestrator.db.tables import (
    ROWS_PER_JOB,
    ChoiceRow,
    ItemRow,
    JobRow,
    PointRow,
    RequestRow,
    ScoreRow,
    UsageRow,
)
from orchestrator.errors import NotFound

STATES = ("queued", "running", "succeeded", "failed", "cancelled")
NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "replayed_tokens": 0}


@dataclass(frozen=True, slots=True)
class PointSummary:
    """One point of the sweep: its requests by state, its tokens, its scores.

    `scores`: grader -> (item position, score) of each scored choice, as
    `orchestrator.evaluation.statistics.estimate` takes them.
    """

    id: int
    position: int
    params: Mapping[str, object]
    requests: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    replayed_tokens: int
    scores: Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class PointTotals:
    """One point of the sweep, added up: requests by state, tokens, scores.

    `scores`: grader -> (mean, how many). `mean_tokens`: of the choices that have ended, None
    until one has.
    """

    id: int
    position: int
    params: Mapping[str, object]
    requests: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    replayed_tokens: int
    scores: Mapping[str, tuple[float, int]]
    mean_tokens: float | None


class Point(NamedTuple):
    """One point of a job as it was planned."""

    id: int
    position: int
    params: Mapping[str, object]


def planned_points(
    rows: Connection, job_id: str, *, after: int = -1, limit: int | None = None
) -> list[Point]:
    """The job's points in order, those after the position `after`. Raises NotFound."""
    _number(rows, job_id)
    page = select(PointRow.id, PointRow.position, PointRow.params).where(
        PointRow.job_id == job_id, PointRow.position > after
    )
    return [Point(*row) for row in rows.execute(page.order_by(PointRow.position).limit(limit))]


def counted(rows: Connection, points: Sequence[Point]) -> list[PointTotals]:
    """What these points, which follow each other, come to: a look at every request of theirs."""
    if not points:
        return []
    mine = RequestRow.point_id.between(points[0].id, points[-1].id)
    states = _states_by_point(rows, mine)
    tokens = _tokens_of_points(rows, mine)
    means = _means_by_point(rows, mine)
    lengths = _lengths_by_point(rows, mine)
    return [
        PointTotals(
            id=point.id,
            position=point.position,
            params=point.params,
            requests=states[point.id].total(),
            **{state: states[point.id][state] for state in STATES},
            **tokens.get(point.id, NO_TOKENS),
            scores=means.get(point.id, {}),
            mean_tokens=lengths.get(point.id),
        )
        for point in points
    ]


def points_summary(db: Database, job_id: str) -> list[PointSummary]:
    """Every point of the job in order. Raises NotFound."""
    with db.read() as rows:
        number = _number(rows, job_id)
        points = rows.execute(
            select(PointRow.id, PointRow.position, PointRow.params)
            .where(PointRow.job_id == job_id)
            .order_by(PointRow.position)
        ).all()
        states = _states_by_point(rows, RequestRow.job_id == job_id)
        tokens = _tokens_by_point(rows, number)
        scores = _scores_by_point(rows, number)
    return [
        PointSummary(
            id=point.id,
            position=point.position,
            params=point.params,
            requests=states[point.id].total(),
            **{state: states[point.id][state] for state in STATES},
            **tokens.get(point.id, NO_TOKENS),
            scores=scores.get(point.id, {}),
        )
        for point in points
    ]


def _number(rows: Connection, job_id: str) -> int:
    number = rows.scalar(
        select(JobRow.number).where(JobRow.id == job_id, JobRow.planned_at.is_not(None))
    )
    if number is None:
        raise NotFound("job", job_id)
    return number


def _states_by_point(rows: Connection, mine: ColumnElement[bool]) -> defaultdict[int, Counter[str]]:
    counted = (
        select(RequestRow.point_id, RequestRow.state, func.count())
        .where(mine)
        .group_by(RequestRow.point_id, RequestRow.state)
    )
    found: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for point_id, state, count in rows.execute(counted):
        found[point_id][state] = count
    return found


def _tokens_by_point(rows: Connection, number: int) -> dict[int, dict[str, int]]:
    """Per point: the prompts once per request, completion and replayed tokens of all attempts."""
    per_request = (
        select(
            UsageRow.request_id,
            func.max(UsageRow.prompt_tokens).label("prompt"),
            func.sum(UsageRow.completion_tokens).label("completion"),
            func.sum(UsageRow.replayed_tokens).label("replayed"),
        )
        .where(*_of_job(UsageRow.request_id, number))
        .group_by(UsageRow.request_id)
        .subquery()
    )
    total = per_request.c
    per_point = (
        select(
            RequestRow.point_id,
            func.sum(total.prompt),
            func.sum(total.completion),
            func.sum(total.replayed),
        )
        .join(per_request, total.request_id == RequestRow.id)
        .group_by(RequestRow.point_id)
    )
    return {
        point_id: dict(zip(NO_TOKENS, map(int, sums), strict=True))
        for point_id, *sums in rows.execute(per_point)
    }


def _tokens_of_points(rows: Connection, mine: ColumnElement[bool]) -> dict[int, dict[str, int]]:
    """As `_tokens_by_point`, of the requests of some points."""
    per_request = (
        select(
            RequestRow.point_id,
            func.max(UsageRow.prompt_tokens).label("prompt"),
            func.sum(UsageRow.completion_tokens).label("completion"),
            func.sum(UsageRow.replayed_tokens).label("replayed"),
        )
        .join(UsageRow, UsageRow.request_id == RequestRow.id)
        .where(mine)
        .group_by(RequestRow.point_id, RequestRow.id)
        .subquery()
    )
    total = per_request.c
    per_point = select(
        total.point_id, func.sum(total.prompt), func.sum(total.completion), func.sum(total.replayed)
    ).group_by(total.point_id)
    return {
        point_id: dict(zip(NO_TOKENS, map(int, sums), strict=True))
        for point_id, *sums in rows.execute(per_point)
    }


def _means_by_point(
    rows: Connection, mine: ColumnElement[bool]
) -> dict[int, dict[str, tuple[float, int]]]:
    scored = (
        select(RequestRow.point_id, ScoreRow.grader, func.avg(ScoreRow.score), func.count())
        .join(ScoreRow, ScoreRow.request_id == RequestRow.id)
        .where(mine)
        .group_by(RequestRow.point_id, ScoreRow.grader)
        .order_by(ScoreRow.grader)
    )
    found: dict[int, dict[str, tuple[float, int]]] = {}
    for point_id, grader, mean, count in rows.execute(scored):
        found.setdefault(point_id, {})[grader] = (float(mean), count)
    return found


def _lengths_by_point(rows: Connection, mine: ColumnElement[bool]) -> dict[int, float]:
    ended = (
        select(RequestRow.point_id, func.avg(ChoiceRow.n_tokens))
        .join(ChoiceRow, ChoiceRow.request_id == RequestRow.id)
        .where(mine, ChoiceRow.finish_reason.is_not(None))
        .group_by(RequestRow.point_id)
    )
    return {point_id: float(mean) for point_id, mean in rows.execute(ended)}


def _scores_by_point(
    rows: Connection, number: int
) -> dict[int, dict[str, list[tuple[int, float]]]]:
    scored = (
        select(RequestRow.point_id, ScoreRow.grader, ItemRow.position, ScoreRow.score)
        .join(RequestRow, RequestRow.id == ScoreRow.request_id)
        .join(ItemRow, ItemRow.id == RequestRow.item_id)
        .where(*_of_job(ScoreRow.request_id, number))
        .order_by(ScoreRow.request_id, ScoreRow.choice)
    )
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for point_id, grader, item, score in rows.execute(scored):
        found.setdefault(point_id, {}).setdefault(grader, []).append((item, score))
    return found


def _of_job(request_id: InstrumentedAttribute[int], number: int) -> tuple[ColumnElement[bool], ...]:
    first = number * ROWS_PER_JOB
    return request_id >= first, request_id < first + ROWS_PER_JOB
