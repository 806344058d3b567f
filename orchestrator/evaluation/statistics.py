"""The mean of scores and its standard error, clustered by item; pure.

Knows nothing of graders, SQL or tables: numbers in, numbers out. The result does not depend on
the order of the rows, to the last bit, as every sum is an exactly rounded `math.fsum`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error; the error is None where fewer than two items were scored."""

    mean: float
    standard_error: float | None
    n: int
    n_items: int


def estimate(scores: Iterable[tuple[Hashable, float]]) -> Estimate | None:
    """The mean of (item, score) pairs and its cluster-robust standard error; None without pairs.

    Scores of one item (its seeds, its choices) answer the same question and are not independent,
    so whole items count as the draws. With n scores x_ci of item c in G items and their mean m:

        SE² = G / (G - 1) · Σ_c (Σ_i (x_ci - m))² / n²

    This is equation 4 of Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640), with the
    small-sample factor G / (G - 1) of Cameron & Miller 2015, "A Practitioner's Guide to
    Cluster-Robust Inference", section II.B (one regressor, the constant). With one score per item
    it is the usual s / √n, s² having the divisor n - 1.
    """
    groups: dict[Hashable, list[float]] = {}
    for item, score in scores:
        groups.setdefault(item, []).append(score)
    n = sum(map(len, groups.values()))
    if n == 0:
        return None
    mean = math.fsum(x for group in groups.values() for x in group) / n
    return Estimate(mean, _clustered_error(list(groups.values()), mean, n), n, len(groups))


def _clustered_error(groups: list[list[float]], mean: float, n: int) -> float | None:
    if len(groups) < 2:
        return None
    residuals = (math.fsum(x - mean for x in group) for group in groups)
    small_sample = len(groups) / (len(groups) - 1)
    return math.sqrt(small_sample * math.fsum(r * r for r in residuals)) / n
