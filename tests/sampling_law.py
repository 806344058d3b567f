"""The law of sampling, step by step in float64; what tells whether draws obey it; rows to try."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from orchestrator.errors import RequestError
from workers.drawing.sampler import HostSampler, Sampled, SamplerRow, Sampling


def sample(
    logits: np.ndarray, rows: Sequence[SamplerRow], vocab_size: int, threads: int = 1
) -> list[Sampled | RequestError]:
    """Each row of logits sampled with the row that stands in its place."""
    return HostSampler(vocab_size, threads).sample(logits, range(len(logits)), rows)


def sampled(x: Sequence[float] | np.ndarray, row: SamplerRow) -> Sampled | RequestError:
    """One row sampled alone."""
    return sample(np.array([x], dtype=np.float32), [row], len(x))[0]


def probabilities(
    logits: Sequence[float],
    sampling: Sampling,
    counts: Counter[int] | None = None,
    allowed: Sequence[int] | None = None,
) -> np.ndarray:
    """Each token's probability; `counts` of the tokens so far, `allowed` None: all."""
    x = [float(value) for value in logits]
    for j, count in (counts or Counter()).items():
        x[j] -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
    for j, bias in sampling.logit_bias:
        x[j] += bias
    if allowed is not None:
        x = [value if j in allowed else -math.inf for j, value in enumerate(x)]
    weights = [math.exp((value - max(x)) / sampling.temperature) for value in x]
    total = math.fsum(weights)
    p = [weight / total for weight in weights]
    kept, before = set(), 0.0
    for j in sorted(range(len(p)), key=lambda j: (-p[j], j)):
        if kept and before >= sampling.top_p:
            break
        kept.add(j)
        before += p[j]
    return np.array([p[j] / before if j in kept else 0.0 for j in range(len(p))])


def chi_square_z(observed: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic as standard deviations (Wilson and Hilferty 1931).

    `observed` are counts, `expected` probabilities. Above 4.9 with a probability of 5e-7.
    """
    assert observed[expected == 0].sum() == 0, "a token of probability 0 was drawn"
    n, mean = observed.sum(), expected[expected > 0] * observed.sum()
    assert mean.min() > 5
    statistic = float(((observed[expected > 0] - mean) ** 2 / mean).sum())
    degrees = mean.size - 1
    if degrees == 0:
        assert observed[expected > 0][0] == n
        return 0.0
    return float(
        ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    )


def along(sampling: Sampling, draws: int, **fields: object) -> list[SamplerRow]:
    """The same row at the positions 0, 1, 2, ..."""
    return [SamplerRow(sampling, position=at, **fields) for at in range(draws)]  # type: ignore[arg-type]


def tokens_of(logits: np.ndarray, rows: Sequence[SamplerRow]) -> list[int]:
    """The tokens of rows that all have the same logits."""
    same = np.array([logits], dtype=np.float32)
    outcomes = HostSampler(logits.size).sample(same, [0] * len(rows), rows)
    assert all(isinstance(outcome, Sampled) for outcome in outcomes), outcomes
    return [outcome.token for outcome in outcomes if isinstance(outcome, Sampled)]


def bits(allowed: Sequence[int], size: int) -> np.ndarray:
    """A mask that allows these tokens, as llguidance lays it out."""
    mask = np.zeros((size + 31) // 32, dtype=np.int32)
    for token in allowed:
        mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    return mask


KINDS = (
    "flat", "equal", "peaked", "one", "tied", "halves", "forbidden", "few", "wide", "steep", "zeros"
)  # fmt: skip


def row_of_kind(kind: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Float32 logits that try a sampler in one way or another; the largest is finite."""
    normal = rng.normal(size=size)
    if kind == "peaked":
        x = normal * 2
        x[rng.integers(0, size, 30)] += np.linspace(8, 24, 30)
    elif kind == "forbidden":
        x = np.where(rng.random(size) < 0.999, -np.inf, normal)
        x[rng.integers(size)] = 0.5
    elif kind == "steep":
        x = np.concatenate([normal[1:] - np.linspace(0, 200, size - 1), [-500]])
    else:
        x = {
            "flat": normal,
            "equal": np.zeros(size),
            "one": np.where(np.arange(size) == size // 2, 60.0, normal),
            "tied": np.round(normal * 2),
            "halves": normal.astype(np.float16),
            "few": np.where(np.arange(size) % 50 == 0, normal, -np.inf),
            "wide": normal * 1e30,
            "zeros": np.where(rng.random(size) < 0.5, -0.0, 0.0),
        }[kind]
    return x.astype(np.float32)
