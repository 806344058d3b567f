"""What came out of each point of a sweep: counts, tokens, and every grader's mean with its error.

Pure: summaries in, rows of text or plain JSON values out. Knows nothing of terminals or SQL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from orchestrator.db.views import PointSummary
from orchestrator.evaluation.statistics import Estimate, estimate

MAX_CELL = 32


@dataclass(frozen=True, slots=True)
class PointReport:
    """One point: `params` are the varied ones, `open` the requests that have not ended."""

    position: int
    params: Mapping[str, object]
    requests: int
    open: int
    succeeded: int
    failed: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    scores: Mapping[str, Estimate]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; an error that is not known is null."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TextTable:
    """Cells of text under a header; the first `n_labels` columns say which point it is."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    n_labels: int


def report(points: Iterable[PointSummary]) -> list[PointReport]:
    """One row per point, in the order given; a grader without any score has none."""
    return [
        PointReport(
            position=point.position,
            params=point.params,
            requests=point.requests,
            open=point.queued + point.running,
            succeeded=point.succeeded,
            failed=point.failed,
            cancelled=point.cancelled,
            prompt_tokens=point.prompt_tokens,
            completion_tokens=point.completion_tokens,
            scores=_estimates(point.scores),
        )
        for point in points
    ]


def table(points: Sequence[PointReport]) -> TextTable:
    """The rows as text, mean ± standard error per grader; columns that say nothing are left out."""
    params = _names(point.params for point in points)
    graders = _names(point.scores for point in points)
    counts = ["requests"]
    counts += [name for name in ("open", "cancelled") if any(getattr(p, name) for p in points)]
    counts += ["failed", "completion_tokens"]
    header = (*(params or ["point"]), *counts[:-1], "tokens", *graders)
    rows = tuple(
        (
            *(_labels(point, params) if params else ("all",)),
            *(str(getattr(point, name)) for name in counts),
            *(plus_minus(point.scores.get(name)) for name in graders),
        )
        for point in points
    )
    return TextTable(header, rows, max(1, len(params)))


def plus_minus(score: Estimate | None) -> str:
    """`0.950 ± 0.021`; the error is left out where it is not known."""
    if score is None:
        return "-"
    error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
    return f"{score.mean:.3f}{error}"


def _estimates(scores: Mapping[str, Iterable[tuple[int, float]]]) -> dict[str, Estimate]:
    estimates = ((grader, estimate(pairs)) for grader, pairs in scores.items())
    return {grader: known for grader, known in estimates if known is not None}


def _names(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _labels(point: PointReport, params: Sequence[str]) -> list[str]:
    return [_cell(point.params[name]) if name in point.params else "-" for name in params]


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
