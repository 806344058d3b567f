"""The sampler against plain referees: its numbers, its order, its errors, its independence.

How often each token comes up stands in test_sampling_frequencies.py, how a token is found in a row
in test_kernels.py.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.errors import RequestError
from tests.sampling_law import (
    KINDS,
    along,
    bits,
    chi_square_z,
    row_of_kind,
    sample,
    tokens_of,
)
from tests.sampling_law import sampled as one
from workers.drawing.philox import uniform
from workers.drawing.sampler import HostSampler, Sampled, SamplerRow, Sampling

REAL_VOCABULARY = 151_936


# --- the random numbers


def philox4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 after Salmon et al. 2011, in plain integers."""
    word = 2**64 - 1
    c = [counter >> shift & word for shift in (0, 64, 128, 192)]
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k0, second & word, first >> 64 ^ c[3] ^ k1, first & word]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return c


def test_the_referee_knows_the_published_answer() -> None:
    # Random123's kat_vectors, philox4x64-10, all zero
    assert philox4x64(0, (0, 0))[:2] == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 + 5])
@pytest.mark.parametrize("choice", [0, 1, 127])
@pytest.mark.parametrize("position", [0, 1, 4095])
def test_a_number_is_philox_of_seed_choice_and_position(
    seed: int, choice: int, position: int
) -> None:
    raw = philox4x64(position + 1, (seed % 2**64, choice))[0]
    assert uniform(seed, choice, position) == (raw >> 11) / 2**53


def test_the_numbers_are_uniform_along_every_axis() -> None:
    for name, numbers in {
        "seed": [uniform(at, 0, 0) for at in range(20_000)],
        "choice": [uniform(7, at, 0) for at in range(20_000)],
        "position": [uniform(7, 0, at) for at in range(20_000)],
    }.items():
        bins = (np.array(numbers) * 32).astype(int)
        pairs = bins[:-1] // 4 * 8 + bins[1:] // 4
        assert chi_square_z(np.bincount(bins, minlength=32), np.full(32, 1 / 32)) < 4, name
        assert chi_square_z(np.bincount(pairs, minlength=64), np.full(64, 1 / 64)) < 4, name


# --- the order of operations


def test_greedy_takes_the_smallest_of_the_largest() -> None:
    for temperature in (0.0, 9e-6):
        rows = along(Sampling(temperature, seed=9), 50)
        assert set(tokens_of(np.array([1, 3, 3, 2]), rows)) == {1}
    assert one([-0.0, 0.0], SamplerRow(Sampling(0.0))) == Sampled(0)


def test_top_p_0_keeps_only_the_top_token() -> None:
    rows = along(Sampling(top_p=0.0, temperature=2.0), 50)
    assert set(tokens_of(np.array([0.1, 0.2, 0.2]), rows)) == {1}


def test_penalties_count_the_sampled_tokens() -> None:
    row = SamplerRow.resumed(Sampling(0.0, frequency_penalty=0.5, presence_penalty=1.0), 0, [2, 2])
    assert one([0.0, 0.0, 1.9, -9.0], row) == Sampled(0)  # 1.9 - 2 * 0.5 - 1 < 0
    assert one([0.0, 0.0, 2.1, -9.0], row) == Sampled(2)
    reward = SamplerRow.resumed(Sampling(0.0, frequency_penalty=-2.0), 0, [3])
    assert one([0.0, 0.0, 1.9, 0.0], reward) == Sampled(3)


def test_penalties_of_many_tokens_follow_from_the_counts() -> None:
    size, sampling = 900, Sampling(0.0, frequency_penalty=0.3, presence_penalty=-0.7)
    rng = np.random.default_rng(12)
    tokens = rng.integers(0, 500, 700).tolist()
    row = SamplerRow(sampling)
    for length, token in enumerate(tokens, 1):
        row.advance(token)
        if length in (1, 63, 64, 65, 200, 700):
            x = rng.normal(size=size).astype(np.float32) / 100  # what counts decides
            expected = x.astype(np.float64)
            for each in set(tokens[:length]):
                expected[each] -= 0.3 * tokens[:length].count(each) - 0.7
            assert one(x, row) == Sampled(int(expected.argmax())), length
            assert one(x, SamplerRow.resumed(sampling, 0, tokens[:length])) == one(x, row)


def test_bias_forces_and_removes() -> None:
    rows = along(Sampling(logit_bias=((0, -100.0), (2, 100.0))), 200)
    assert set(tokens_of(np.array([5, 4, -6, 1]), rows)) == {2}


def test_the_mask_comes_after_the_bias() -> None:
    size = 70
    x = np.zeros(size, dtype=np.float32)
    bias = ((1, 100.0), *((token, -100.0) for token in (31, 32, 69)))
    rows = along(Sampling(logit_bias=bias, temperature=2.0), 300, mask=bits([31, 32, 69], size))
    assert set(tokens_of(x, rows)) == {31, 32, 69}
    greedy = SamplerRow(Sampling(0.0, logit_bias=bias), mask=bits([69], size))
    assert one(x.tolist(), greedy) == Sampled(69)


def test_padding_columns_are_never_looked_at() -> None:
    logits = np.zeros((40, 9), dtype=np.float32)
    logits[:, 5] = np.nan
    logits[:, 6:] = 1e9
    sampling = Sampling(logprobs=True, top_logprobs=20)
    for outcome in sample(logits, along(sampling, 40), 5):
        assert isinstance(outcome, Sampled)
        assert outcome.token < 5
        assert [token for token, _ in outcome.top] == [0, 1, 2, 3, 4]
        assert outcome.logprob == pytest.approx(-math.log(5))


def test_logits_and_rows_are_left_as_they_were() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(2, 6)
    logits.setflags(write=False)
    sampling = Sampling(logit_bias=((0, 3.0),), presence_penalty=1.0, logprobs=True)
    rows = [SamplerRow.resumed(sampling, 0, [1]), SamplerRow(sampling, mask=bits([2], 6))]
    sample(logits, rows, 6)
    assert logits.tolist() == np.arange(12).reshape(2, 6).tolist()
    assert [row.position for row in rows] == [1, 0]


# --- log-probabilities


def test_logprobs_are_the_models_own() -> None:
    x = [2.0, 1.0, 1.0, -math.inf, 0.0]
    total = math.log(sum(math.exp(value) for value in x))
    sampling = Sampling(
        0.0, logit_bias=((4, 100.0),), presence_penalty=2.0, logprobs=True, top_logprobs=4
    )
    sampled = one(x, SamplerRow.resumed(sampling, 0, [4]))
    assert isinstance(sampled, Sampled)
    assert sampled.token == 4
    assert sampled.logprob == pytest.approx(-total, abs=1e-6)
    assert [token for token, _ in sampled.top] == [0, 1, 2, 4]
    assert [p for _, p in sampled.top] == pytest.approx([2 - total, 1 - total, 1 - total, -total])
    everything = one(x, SamplerRow(Sampling(0.0, logprobs=True, top_logprobs=20)))
    assert isinstance(everything, Sampled)
    assert everything.top[-1] == (3, -9999.0)


def test_without_logprobs_nothing_is_reported() -> None:
    assert one([0.0, 1.0], SamplerRow(Sampling(0.0, top_logprobs=2))) == Sampled(1, None, ())


@pytest.mark.parametrize("size", [3, 600, 5_000, REAL_VOCABULARY])
def test_top_logprobs_are_those_of_a_full_sort(size: int) -> None:
    rng = np.random.default_rng(size)
    print(f"seed {size}")
    for kind in KINDS:
        x = row_of_kind(kind, rng, size)
        for k in (1, 5, 20):
            sampled = sample(
                x[None], [SamplerRow(Sampling(0.0, logprobs=True, top_logprobs=k))], size
            )[0]
            assert isinstance(sampled, Sampled)
            order = np.argsort(-x, kind="stable")[:k]
            assert [token for token, _ in sampled.top] == order.tolist(), kind
            exact = x.astype(np.float64) - float(x.max())
            exact -= math.log(np.exp(exact).sum())
            assert [p for _, p in sampled.top] == pytest.approx(
                [max(exact[j], -9999.0) for j in order], rel=1e-6, abs=1e-6
            )
            assert sampled.logprob == sampled.top[0][1]


@pytest.mark.parametrize("amount", [-20.0, -0.5, 0.5, 20.0])
@pytest.mark.parametrize("token", ["the likeliest", "another", "both"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_who_asks_for_logprobs_gets_the_same_tokens(
    temperature: float, token: str, amount: float
) -> None:
    """Bias, penalties and masks move the peak, or what lies below it; some sums are then known."""
    size = 9_000
    x = row_of_kind("flat", np.random.default_rng(6), size)
    ids = {"the likeliest": [int(x.argmax())], "another": [17], "both": [int(x.argmax()), 17]}
    bias = tuple((each, amount) for each in ids[token])
    for top_p in (0.9, 1.0):
        plain = Sampling(temperature, top_p, 0.3, -0.2, bias, seed=1)
        asked = replace(plain, logprobs=True, top_logprobs=2)
        counts = {17: 2, 40: 1, int(x.argmin()): 3}
        for mask in (None, bits(np.argsort(-x)[:7_000].tolist(), size)):
            expected = tokens_of(x, along(plain, 60, counts=dict(counts), mask=mask))
            assert tokens_of(x, along(asked, 60, counts=dict(counts), mask=mask)) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bias", [(), ((4, 2.0),)])
def test_a_replayed_token_scores_as_it_was_sampled(
    temperature: float, bias: tuple[tuple[int, float], ...]
) -> None:
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(20, 300)) * 3).astype(np.float32)
    sampling = Sampling(temperature, logprobs=True, top_logprobs=5, logit_bias=bias)
    rows = along(sampling, 20)
    for x, row, sampled in zip(logits, rows, sample(logits, rows, 290), strict=True):
        assert isinstance(sampled, Sampled)
        assert HostSampler(290).score(x[None], 0, row, sampled.token) == sampled


# --- errors stay in their row


@pytest.mark.parametrize(
    "bad", [[1, math.nan, 2], [math.nan] * 3, [0, math.inf, 1], [-math.inf] * 3]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_distribution_fails_alone(bad: list[float], temperature: float) -> None:
    logits = np.array([[1, 9, 2], bad, [7, 1, 2]], dtype=np.float32)
    rows = [SamplerRow(Sampling(0.0)), SamplerRow(Sampling(temperature)), SamplerRow(Sampling(0.0))]
    before, error, after = sample(logits, rows, 3)
    assert (before, after) == (Sampled(1), Sampled(0))
    assert isinstance(error, RequestError)
    assert error.code == "nan_logits"
    assert error.message.startswith("row 1: ")
    scored = HostSampler(3).score(logits, 1, rows[1], 0)
    assert isinstance(scored, RequestError)
    assert scored.code == "nan_logits"


def test_a_mask_that_leaves_nothing_is_an_error() -> None:
    error = one([1.0, 2.0, 3.0], SamplerRow(Sampling(), mask=bits([], 3)))
    assert isinstance(error, RequestError)
    assert error.code == "no_token_allowed"


def test_there_is_one_row_for_each_row_of_logits() -> None:
    with pytest.raises(ValueError, match="zip"):
        sample(np.zeros((2, 3), dtype=np.float32), [SamplerRow(Sampling())], 3)


def test_a_vocabulary_beyond_exact_sums_is_refused() -> None:
    with pytest.raises(ValueError, match="can be sampled"):
        HostSampler(2**19)


def test_what_is_not_there_is_not_read() -> None:
    sampler, logits = HostSampler(3), np.zeros((2, 3), dtype=np.float32)
    biased = Sampling(logit_bias=((3, 1.0),))
    for index, row in (
        (2, SamplerRow(Sampling())),
        (0, SamplerRow(biased)),
        (0, SamplerRow(Sampling(), mask=np.empty(0, np.int32))),
        (0, SamplerRow.resumed(Sampling(presence_penalty=1.0), 0, [9])),
    ):
        with pytest.raises(IndexError):
            sampler.sample(logits, [index], [row])
    with pytest.raises(IndexError):
        sampler.score(logits, 0, SamplerRow(Sampling()), 3)


# --- independence


def mixed_rows(rng: np.random.Generator, size: int, count: int) -> list[SamplerRow]:
    def sampling(at: int) -> Sampling:
        return Sampling(
            temperature=float(rng.choice([0.0, 0.5, 1.0, 1.7])),
            top_p=float(rng.choice([0.3, 0.95, 1.0])),
            frequency_penalty=float(rng.choice([0.0, 0.6])),
            presence_penalty=float(rng.choice([0.0, -0.5])),
            logit_bias=((3, 2.5), (4, -100.0)) if at % 3 == 0 else (),
            logprobs=at % 2 == 0,
            top_logprobs=at % 5,
            seed=int(rng.integers(2**62)),
        )

    rows = [
        SamplerRow.resumed(sampling(at), at % 4, rng.integers(0, size, at).tolist())
        for at in range(count)
    ]
    for row in rows[1::3]:
        row.mask = bits(np.flatnonzero(rng.random(size) < rng.choice([0.1, 0.9])).tolist(), size)
    return rows


@pytest.mark.parametrize("size", [50, 1_021, 30_000])
def test_a_row_is_sampled_alike_alone_and_in_any_batch(size: int) -> None:
    rng = np.random.default_rng(size)
    count = 24
    rows = mixed_rows(rng, size, count)
    logits = (rng.normal(size=(count, size)) * 2).astype(np.float32)
    together = sample(logits, rows, size)
    assert [sample(logits[[i]], [rows[i]], size)[0] for i in range(count)] == together
    for _ in range(5):
        some = rng.permutation(count)[: rng.integers(1, count)]
        padded = np.full((some.size, size + int(rng.integers(0, 70))), 5, dtype=np.float32)
        padded[:, :size] = logits[some]
        assert sample(padded, [rows[i] for i in some], size) == [together[i] for i in some]


def test_a_resumed_choice_goes_on_as_if_nothing_had_happened() -> None:
    rng = np.random.default_rng(8)
    size, length = 60, 40
    sampling = Sampling(1.3, 0.9, 0.4, 0.3, logprobs=True, top_logprobs=3, seed=77)
    steps = (rng.normal(size=(length, size)) * 2).astype(np.float32)

    def generate(row: SamplerRow) -> list[Sampled | RequestError]:
        outcomes = []
        for at in range(row.position, length):
            [sampled] = sample(steps[[at]], [row], size)
            assert isinstance(sampled, Sampled)
            row.advance(sampled.token)
            outcomes.append(sampled)
        return outcomes

    golden = generate(SamplerRow(sampling, choice=2))
    tokens = [sampled.token for sampled in golden if isinstance(sampled, Sampled)]
    assert len(set(tokens)) < length, "no token repeats: the penalties are not tried"
    for at in range(length):
        persisted = np.array(tokens[:at], dtype=np.int32).tolist()
        assert generate(SamplerRow.resumed(sampling, 2, persisted)) == golden[at:]


def test_choices_and_seeds_differ() -> None:
    drawn = {
        (seed, choice): tuple(
            tokens_of(np.zeros(1000), along(Sampling(seed=seed), 30, choice=choice))
        )
        for seed in (1, 2)
        for choice in (0, 1)
    }
    assert len(set(drawn.values())) == 4
