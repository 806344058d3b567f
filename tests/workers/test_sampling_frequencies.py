"""How often each token comes up, against its exact probability; seeds, choices and positions.

Every seed is fixed, so a run repeats; with another one, a sound sampler would fail a test with a
probability under 1e-6.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.sampling_law import along, bits, chi_square_z, probabilities, tokens_of
from workers.drawing.sampler import SamplerRow, Sampling

SEED = 20_240_806
DRAWS = 10_000
LIMIT = 4.9  # standard deviations: exceeded by chance with a probability of 5e-7

LOGITS = (1.2, 0.9, 0.9, 0.5, 0.1, -0.2, -0.4, 0.7, 1.1, -0.9, 0.0, -0.6)
COUNTS = Counter({1: 3, 4: 1, 8: 2})
BIAS = ((0, -100.0), (5, 1.5), (11, 0.25))


def assert_frequencies(observed: np.ndarray, expected: np.ndarray) -> None:
    z = chi_square_z(observed, expected)
    print(f"seed {SEED}: {observed.sum()} draws, z = {z:.2f}")
    assert abs(z) < LIMIT


@pytest.mark.parametrize("allowed", [None, (1, 2, 4, 5, 8, 9, 11)], ids=["any", "masked"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.4),
        Sampling(temperature=2.0),
        Sampling(top_p=0.9),
        Sampling(temperature=0.7, top_p=0.5),
        Sampling(temperature=1.5, top_p=0.95),
        Sampling(frequency_penalty=0.7),
        Sampling(presence_penalty=0.9),
        Sampling(frequency_penalty=-0.5, presence_penalty=0.4),
        Sampling(frequency_penalty=0.3, presence_penalty=-1.0),
        Sampling(logit_bias=((3, 2.0), (8, -1.5))),
        Sampling(0.8, 0.85, frequency_penalty=-0.3, presence_penalty=1.1, logit_bias=BIAS),
    ],
    ids=str,
)
def test_frequencies_are_the_exact_probabilities(
    sampling: Sampling, allowed: Sequence[int] | None
) -> None:
    sampling = replace(sampling, seed=SEED)
    mask = None if allowed is None else bits(allowed, len(LOGITS))
    rows = along(sampling, DRAWS, counts=dict(COUNTS), mask=mask)
    observed = np.bincount(tokens_of(np.array(LOGITS), rows), minlength=len(LOGITS))
    assert observed.sum() == DRAWS
    assert_frequencies(observed, probabilities(LOGITS, sampling, COUNTS, allowed))


def binned(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The 40 most probable tokens each for itself, the others in 30 bins by their ids."""
    rank = np.empty(by.size, dtype=int)
    rank[np.argsort(-by, kind="stable")] = np.arange(by.size)
    bins = np.where(rank < 40, rank, 40 + np.arange(by.size) % 30)
    return np.bincount(bins, weights=x, minlength=70)


@pytest.mark.parametrize("allowed", ["any", "most", "few"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(1.4, top_p=0.97, logit_bias=((77, 9.0), (78, -100.0))),
        Sampling(0.9, frequency_penalty=0.4, presence_penalty=0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("std", [0.6, 3.0], ids=["flat", "peaked"])
def test_frequencies_in_a_large_vocabulary(std: float, sampling: Sampling, allowed: str) -> None:
    size, draws = 12_000, 2_500
    rng = np.random.default_rng(SEED)
    x = (rng.standard_normal(size) * std).astype(np.float32)
    kept = {"any": size, "most": size - 900, "few": 500}[allowed]
    ids = set(rng.permutation(size)[:kept].tolist())
    counts = Counter(rng.integers(0, size, 50).tolist() + [int(x.argmax())] * 4)
    rows = along(replace(sampling, seed=SEED), draws, counts=dict(counts))
    if allowed != "any":
        for row in rows:
            row.mask = bits(ids, size) if row is rows[0] else rows[0].mask
    drawn = tokens_of(x, rows)
    exact = probabilities(x.tolist(), sampling, counts, ids)
    observed = np.bincount(drawn, minlength=size)
    assert observed[exact == 0].sum() == 0
    expected = binned(exact, by=exact)
    thin = expected * draws <= 5
    expected[np.flatnonzero(~thin)[-1]] += expected[thin].sum()
    seen = binned(observed, by=exact)
    seen[np.flatnonzero(~thin)[-1]] += seen[thin].sum()
    assert_frequencies(seen[~thin], expected[~thin])


def test_whole_sequences_come_as_often_as_their_chain_of_probabilities() -> None:
    """Penalties see what the choice itself has sampled, and nothing else."""
    sampling = Sampling(1.2, frequency_penalty=0.8, presence_penalty=-0.5, seed=SEED)
    logits, length, choices = (0.4, 0.0, -0.3), 3, 8_000
    rows = [SamplerRow(sampling, choice) for choice in range(choices)]
    sequences: list[tuple[int, ...]] = [()] * choices
    for _ in range(length):
        for at, token in enumerate(tokens_of(np.array(logits), rows)):
            rows[at].advance(token)
            sequences[at] += (token,)
    every = list(itertools.product(range(len(logits)), repeat=length))
    expected = np.array([chain(logits, sampling, sequence) for sequence in every])
    assert expected.sum() == pytest.approx(1)
    counted = Counter(sequences)
    assert_frequencies(np.array([counted[sequence] for sequence in every]), expected)


def chain(logits: Sequence[float], sampling: Sampling, sequence: Sequence[int]) -> float:
    product = 1.0
    for at, token in enumerate(sequence):
        product *= probabilities(logits, sampling, Counter(sequence[:at]))[token]
    return float(product)


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_neighbours_are_independent(axis: str) -> None:
    """Pairs of neighbouring seeds, choices or positions come as often as chance has it."""
    logits = (0.5, 0.2, 0.0, -0.4)
    rows = []
    for at in range(DRAWS):
        seed, choice, position = (SEED + at * (axis == "seed"), at * (axis == "choice"), at)
        position *= axis == "position"
        rows.append(SamplerRow(Sampling(seed=seed), choice, position))
    drawn = np.array(tokens_of(np.array(logits), rows))
    p = probabilities(logits, Sampling())
    for apart in (1, 2, 7):
        pairs = drawn[::2] * 4 + np.roll(drawn, -apart)[::2]  # roll: the last with the first
        assert_frequencies(np.bincount(pairs, minlength=16), np.outer(p, p).ravel())


def test_every_choice_of_every_seed_is_a_stream_of_its_own() -> None:
    streams = {
        tuple(tokens_of(np.zeros(1000), along(Sampling(seed=seed), 30, choice=choice)))
        for seed in (1, 2, -1, 2**62)
        for choice in range(8)
    }
    assert len(streams) == 32
