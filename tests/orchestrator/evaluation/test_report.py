"""Summaries of points to the rows of a table and to plain JSON."""

import json

from orchestrator.db.views import PointSummary
from orchestrator.evaluation.report import report, table


def summary(position: int, params: dict[str, object], **values: object) -> PointSummary:
    states = {"queued": 0, "running": 0, "succeeded": 2, "failed": 0, "cancelled": 0}
    tokens = {"prompt_tokens": 20, "completion_tokens": 16, "replayed_tokens": 0}
    return PointSummary(
        **{"id": position, "position": position, "params": params, "requests": 2, "scores": {}}  # type: ignore[arg-type]
        | states
        | tokens
        | values
    )


def test_a_row_per_point_with_mean_and_error_per_grader() -> None:
    scores = {"correct": [(0, 1.0), (1, 0.0)]}
    points = report(
        [
            summary(0, {"seed": 1, "temperature": 0}, scores=scores),
            summary(1, {"seed": 2, "temperature": 0.5}, scores={"correct": [(0, 1.0)]}, failed=1),
            summary(2, {"seed": 3}),
        ]
    )
    made = table(points)
    assert made.header == ("seed", "temperature", "requests", "failed", "tokens", "correct")
    assert made.n_labels == 2
    assert made.rows == (
        ("1", "0", "2", "0", "16", "0.500 ± 0.500"),
        ("2", "0.5", "2", "1", "16", "1.000"),
        ("3", "-", "2", "0", "16", "-"),
    )


def test_a_job_without_a_sweep_is_one_point_and_open_requests_get_a_column() -> None:
    made = table(report([summary(0, {}, queued=1, running=1, succeeded=0)]))
    assert made.header == ("point", "requests", "open", "failed", "tokens")
    assert made.rows == (("all", "2", "2", "0", "16"),)


def test_long_values_are_cut_and_json_holds_everything() -> None:
    messages = [{"role": "user", "content": "a very long question indeed, is it not?"}]
    points = report([summary(0, {"messages": messages}, scores={"g": [(0, 1.0)]})])
    assert len(table(points).rows[0][0]) == 32
    plain = json.loads(json.dumps(points[0].to_json()))
    assert plain["params"] == {"messages": messages}
    assert plain["scores"] == {"g": {"mean": 1.0, "standard_error": None, "n": 1, "n_items": 1}}
