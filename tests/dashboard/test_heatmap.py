"""The grid of a sweep: what is in its cells follows from the points alone."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from orchestrator.api.dashboard import heatmap


@dataclass(frozen=True)
class Totals:
    """A point, as the view adds it up."""

    position: int
    params: Mapping[str, object]
    scores: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    mean_tokens: float | None = None
    succeeded: int = 1


def drawn(points: list[Totals], x: str, y: str | None, measure: str, **fixed: str) -> heatmap.Grid:
    axes = {axis.name: axis for axis in heatmap.axes(points)}
    return heatmap.grid(points, axes[x], axes[y] if y else None, measure, fixed)


def test_only_what_differs_is_an_axis() -> None:
    points = [
        Totals(0, {"temperature": 0, "seed": 1, "top_p": 1}),
        Totals(1, {"temperature": 0.5, "seed": 1, "top_p": True}),
        Totals(2, {"temperature": 0.5, "seed": 1}),
    ]
    found = {axis.name: axis for axis in heatmap.axes(points)}
    assert list(found) == ["temperature", "top_p"]
    assert found["temperature"].values == (0, 0.5) and found["temperature"].numbers
    assert found["top_p"].keys == ("1", "true", "absent") and not found["top_p"].numbers


def test_other_parameters_are_averaged_by_how_much_each_point_stands_for() -> None:
    points = [
        Totals(0, {"t": 0, "s": 1}, {"ok": (1.0, 1)}),
        Totals(1, {"t": 0, "s": 2}, {"ok": (0.0, 3)}),
        Totals(2, {"t": 1, "s": 1}, {}),
        Totals(3, {"t": 1, "s": 2}, {}),
    ]
    first, second = drawn(points, "t", None, "ok").rows[0]
    assert (first.mean, first.count, first.points) == (0.25, 4, (0, 1))
    assert (second.mean, second.count) == (None, 0)
    held = drawn(points, "t", None, "ok", s="2").rows[0][0]
    assert (held.mean, held.points) == (0.0, (1,))


def test_a_grader_called_length_is_not_the_length() -> None:
    points = [
        Totals(0, {"t": 0}, {"length": (0.5, 2)}, mean_tokens=40.0),
        Totals(1, {"t": 1}, {"length": (1.0, 2)}, mean_tokens=80.0),
    ]
    assert [cell.mean for cell in drawn(points, "t", None, "length").rows[0]] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("means", "heats"), [((0.0, 0.5, 1.0), (0, 5, 10)), ((20.0, 25.0, 40.0), (0, 2, 10))]
)
def test_scores_are_coloured_from_0_to_1_and_others_over_their_range(
    means: tuple[float, ...], heats: tuple[int, ...]
) -> None:
    points = [Totals(i, {"t": i}, {"ok": (mean, 1)}) for i, mean in enumerate(means)]
    assert tuple(cell.heat for cell in drawn(points, "t", None, "ok").rows[0]) == heats


def test_every_point_is_in_one_cell_and_the_cells_mean_is_the_points() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    for _ in range(100):
        points = [
            Totals(
                position,
                {
                    name: dice.choice([0, 1, "1", None, [1]])
                    for name in "abc"
                    if dice.random() < 0.8
                },
                {"ok": (dice.random(), dice.randint(1, 9))} if dice.random() < 0.7 else {},
            )
            for position in range(dice.randint(2, 30))
        ]
        axes = heatmap.axes(points)
        if len(axes) < 2:
            continue
        grid = heatmap.grid(points, axes[0], axes[1], "ok", {})
        cells = [cell for row in grid.rows for cell in row]
        assert sorted(p for cell in cells for p in cell.points) == list(range(len(points)))
        for cell in cells:
            inside = [points[p].scores["ok"] for p in cell.points if points[p].scores]
            count = sum(n for _, n in inside)
            assert cell.count == count and 0 <= cell.heat <= 10
            if count:
                assert cell.mean == pytest.approx(sum(m * n for m, n in inside) / count)
