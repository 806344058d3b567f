"""The grid of a sweep: a grader's mean score, or the mean length, over two chosen parameters.

Pure: points in, cells out. The parameters that are neither axis are held at a value or averaged
over, each point by how many values it stands for. Knows nothing of SQL or HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

LENGTH = "length"
STEPS = 10
_ABSENT = "absent"


class Totals(Protocol):
    """What is read of a point (`orchestrator.db.views.PointTotals`)."""

    @property
    def position(self) -> int: ...
    @property
    def params(self) -> Mapping[str, object]: ...
    @property
    def succeeded(self) -> int: ...
    @property
    def scores(self) -> Mapping[str, tuple[float, int]]: ...
    @property
    def mean_tokens(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Axis:
    """One varied parameter and its values in order of their first point.

    `keys` are the values as JSON, which is what tells them apart; a point without the parameter
    has the key `absent`.
    """

    name: str
    keys: tuple[str, ...]
    values: tuple[object, ...]

    @property
    def numbers(self) -> bool:
        """Whether every value is a number."""
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)


@dataclass(frozen=True, slots=True)
class Cell:
    """The mean over `count` scores (lengths: requests) of the points in it; None without any.

    `heat` is from 0 (the low end) to 10.
    """

    mean: float | None
    count: int
    heat: int
    points: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows of cells, one row per value of `y` (one in all if there is no `y`)."""

    measure: str
    x: Axis
    y: Axis | None
    rows: tuple[tuple[Cell, ...], ...]
    low: float
    high: float


def axes(points: Iterable[Totals]) -> tuple[Axis, ...]:
    """The parameters that differ between points, in the order in which points name them."""
    names: dict[str, None] = {}
    kept = list(points)
    for point in kept:
        names |= dict.fromkeys(point.params)
    found = (_axis(name, kept) for name in names)
    return tuple(axis for axis in found if len(axis.keys) > 1)


def _axis(name: str, points: Iterable[Totals]) -> Axis:
    values: dict[str, object] = {}
    for point in points:
        values.setdefault(_key(point, name), point.params.get(name))
    return Axis(name, tuple(values), tuple(values.values()))


def _key(point: Totals, name: str) -> str:
    if name not in point.params:
        return _ABSENT
    return json.dumps(point.params[name], sort_keys=True, ensure_ascii=False)


def measures(points: Iterable[Totals]) -> tuple[str, ...]:
    """The graders that have scored something, then `length`."""
    names: dict[str, None] = {}
    for point in points:
        names |= dict.fromkeys(point.scores)
    return (*names, LENGTH)


def grid(
    points: Sequence[Totals],
    x: Axis,
    y: Axis | None,
    measure: str,
    fixed: Mapping[str, str],
) -> Grid:
    """The cells of `measure`; `fixed`: parameter -> key of the value that it is held at."""
    groups: dict[tuple[str, str], list[Totals]] = {}
    for point in points:
        if all(_key(point, name) == key for name, key in fixed.items()):
            place = (_key(point, y.name) if y else "", _key(point, x.name))
            groups.setdefault(place, []).append(point)
    table = [
        [_mean(groups.get((row, column), []), measure) for column in x.keys]
        for row in (y.keys if y else ("",))
    ]
    low, high = _range([mean for row in table for mean, _, _ in row if mean is not None], measure)
    rows = tuple(
        tuple(Cell(mean, count, _heat(mean, low, high), inside) for mean, count, inside in row)
        for row in table
    )
    return Grid(measure, x, y, rows, low, high)


def _mean(points: Sequence[Totals], measure: str) -> tuple[float | None, int, tuple[int, ...]]:
    total, count = 0.0, 0
    for point in points:
        mean, weight = _value(point, measure)
        if mean is not None and weight:
            total, count = total + mean * weight, count + weight
    inside = tuple(point.position for point in points)
    return (total / count if count else None), count, inside


def _value(point: Totals, measure: str) -> tuple[float | None, int]:
    if measure in point.scores:  # before the length: a grader may have that name
        return point.scores[measure]
    return (point.mean_tokens, point.succeeded) if measure == LENGTH else (None, 0)


def _range(means: Sequence[float], measure: str) -> tuple[float, float]:
    """From 0 to 1 for scores within; else what there is."""
    if not means:
        return 0.0, 1.0
    low, high = min(means), max(means)
    return (0.0, 1.0) if measure != LENGTH and low >= 0 and high <= 1 else (low, high)


def _heat(mean: float | None, low: float, high: float) -> int:
    if mean is None or high <= low:
        return STEPS // 2 if mean is not None else 0
    return round(STEPS * (mean - low) / (high - low))
