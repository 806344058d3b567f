"""The sampler against plain referees: its numbers, its order, its errors, its independence.

How often each token comes up stands in test_sampling_frequencies.py.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import RequestError
from tests.sampling_law import along, bits, chi_square_z, tokens_of
from workers.drawing import rough_sum, sum_of_weights
from workers.philox import uniform
from workers.sampler import Sampled, SamplerRow, Sampling, sample, score

REAL_VOCABULARY = 151_936
POWERS = {"exp2": (np.exp2, 2.0), "exp": (np.exp, math.e)}  # of which a machine uses one


def one(logits: Sequence[float], row: SamplerRow) -> Sampled | RequestError:
    return sample(np.array([logits], dtype=np.float32), [row], len(logits))[0]


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


# --- one result, whichever way to it


def full_sort(x: np.ndarray, sampling: Sampling, u: float) -> int:
    """The whole vocabulary stably sorted, with the sampler's arithmetic."""
    distance = x.max() - x
    weight = np.exp(distance / np.float32(-sampling.temperature))
    order = np.argsort(distance, kind="stable")
    mass = np.cumsum(weight[order], dtype=np.float64)
    total = weight.sum(dtype=np.float64)
    last = int(np.flatnonzero(mass == mass[-1])[0])  # the last that adds to the mass
    if sampling.top_p < 1:
        full = np.flatnonzero(mass >= sampling.top_p * total)
        last = min(last, int(full[0]) if full.size else last)
        total = mass[last]
    beyond = np.flatnonzero(mass > u * total)
    return int(order[min(last, int(beyond[0]) if beyond.size else last)])


def row_kinds(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    normal = rng.normal(size=size)
    peaked = normal * 2
    peaked[rng.integers(0, size, 30)] += np.linspace(8, 24, 30)
    forbidden = rng.random(size) < 0.999
    forbidden[rng.integers(size)] = False
    return {
        "flat": normal,
        "equal": np.zeros(size),
        "peaked": peaked,
        "one": np.where(np.arange(size) == size // 2, 60.0, normal),
        "tied": np.round(normal * 2),
        "forbidden": np.where(forbidden, -np.inf, normal),
        "few": np.where(np.arange(size) % 50 == 0, normal, -np.inf),
        "wide": normal * 1e30,
        "steep": np.concatenate([normal[1:] - np.linspace(0, 200, size - 1), [-500]]),
        "zeros": np.where(rng.random(size) < 0.5, -0.0, 0.0),
    }


@pytest.mark.parametrize("size", [7, 600, 9_011, REAL_VOCABULARY])
def test_heads_give_what_the_full_sort_gives(size: int) -> None:
    rng = np.random.default_rng(size)
    print(f"seed {size}")
    draws = 2 if size == REAL_VOCABULARY else 15
    for kind, values in row_kinds(rng, size).items():
        x = values.astype(np.float32)
        for temperature in (0.1, 1.0, 2.0):
            for top_p in (1e-9, 0.5, 0.95, 1 - 1e-12, 1.0):
                sampling = Sampling(temperature, top_p, seed=int(rng.integers(2**40)))
                rows = along(sampling, draws)
                with np.errstate(over="ignore"):
                    expected = [
                        full_sort(x, sampling, uniform(sampling.seed, 0, i)) for i in range(draws)
                    ]
                drawn = tokens_of(np.broadcast_to(x, (draws, size)), rows, size)
                assert drawn == expected, (kind, temperature, top_p)


@settings(max_examples=300, deadline=None)
@given(
    x=st.lists(
        st.floats(-30, 30, width=32) | st.just(-math.inf) | st.sampled_from([0.0, -0.0, 1.0]),
        min_size=1,
        max_size=40,
    ).filter(lambda x: max(x) > -math.inf),
    temperature=st.floats(1e-5, 2),
    top_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_row_equals_the_full_sort(
    x: list[float], temperature: float, top_p: float, seed: int
) -> None:
    sampling = Sampling(temperature, top_p, seed=seed)
    sampled = one(x, SamplerRow(sampling))
    assert isinstance(sampled, Sampled)
    assert sampled.token == full_sort(np.array(x, dtype=np.float32), sampling, uniform(seed, 0, 0))


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_ends_of_the_random_range(
    monkeypatch: pytest.MonkeyPatch, u: float, top_p: float
) -> None:
    monkeypatch.setattr("workers.sampler.uniform", lambda *_: u)
    rng = np.random.default_rng(3)
    for size in range(4_000, 4_020):
        for kind, values in row_kinds(rng, size).items():
            x = values.astype(np.float32)
            sampling = Sampling(top_p=top_p)
            with np.errstate(over="ignore"):
                expected = full_sort(x, sampling, u)
            assert tokens_of(x[None], [SamplerRow(sampling)], x.size) == [expected], kind


@pytest.fixture(params=POWERS)
def power(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the ways to a rough total, on any machine."""
    function, base = POWERS[request.param]
    monkeypatch.setattr("workers.drawing._power", function)
    monkeypatch.setattr("workers.drawing._BASE", base)


@pytest.mark.usefixtures("power")
@pytest.mark.parametrize("size", [2_049, 30_001, REAL_VOCABULARY])
def test_a_rough_sum_is_as_near_as_it_says(size: int) -> None:
    rng = np.random.default_rng(size)
    print(f"seed {size}")
    for kind, values in row_kinds(rng, size).items():
        for largest in (-39.0, 0.0, 18.3, 39.9, 500.0):
            x = (values - values.max() + largest).astype(np.float32)
            peak, room = x.max(), np.empty_like(x)
            for temperature in (0.05, 0.7, 1.0, 2.0):
                with np.errstate(over="ignore"):
                    rough, slack = rough_sum(x, peak, temperature, room)
                    exact = sum_of_weights(x, peak, temperature, room)
                assert abs(rough - exact) <= slack, (kind, largest, temperature)
                assert slack < exact * 1.2e-5, (kind, largest, temperature)


@pytest.mark.usefixtures("power")
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "steep"])
def test_numbers_on_the_edge_of_two_tokens(
    monkeypatch: pytest.MonkeyPatch, kind: str, top_p: float
) -> None:
    """Where the last bit of a sum decides, the shortcuts decide as the full sort does."""
    rng = np.random.default_rng(31)
    x = row_kinds(rng, 20_000)[kind].astype(np.float32)
    mass = np.sort(np.exp(x - x.max()))[::-1].cumsum(dtype=np.float64)
    for place in (0, 1, 2, 5, 40, 200, 900, 2_500, 9_000):
        for by in (-1e-7, -1e-15, 0.0, 1e-15, 1e-7):
            u = min(float(mass[place] / mass[-1] * (1 + by)), 1 - 2**-53)
            monkeypatch.setattr("workers.sampler.uniform", lambda *_, u=u: u)
            sampling = Sampling(top_p=top_p)
            drawn = tokens_of(x[None], [SamplerRow(sampling)], x.size)
            assert drawn == [full_sort(x, sampling, u)], (place, by)


@pytest.mark.parametrize("size", [70, 9_011, 40_000])
def test_a_masked_row_is_the_row_of_the_allowed_tokens(size: int) -> None:
    rng = np.random.default_rng(size)
    for kind, values in row_kinds(rng, size).items():
        x = values.astype(np.float32)
        for kept in (1, 5, size // 9, size // 3, size - 2):
            allowed = np.sort(rng.permutation(np.flatnonzero(np.isfinite(x)))[:kept])
            row = SamplerRow(Sampling(1.3, 0.9, seed=kept), mask=bits(allowed, size))
            forbidden = np.setdiff1d(np.arange(size), allowed)
            without = x.copy()
            without[forbidden] = -np.inf
            with np.errstate(over="ignore"):
                expected = full_sort(without, row.sampling, uniform(kept, 0, 0))
            assert tokens_of(x[None], [row], size) == [expected], (kind, kept)
            greedy = SamplerRow(Sampling(0.0), mask=row.mask)
            assert tokens_of(x[None], [greedy], size) == [int(without.argmax())], (kind, kept)


def test_float32_weights_agree_with_float64_ones() -> None:
    rng = np.random.default_rng(11)
    x = rng.normal(size=REAL_VOCABULARY).astype(np.float32)
    exact = np.exp(x.astype(np.float64) - float(x.max()))
    order = np.argsort(-x, kind="stable")
    mass = np.cumsum(exact[order])
    rows = along(Sampling(seed=5), 100)
    drawn = tokens_of(np.broadcast_to(x, (100, x.size)), rows, x.size)
    expected = [
        order[np.searchsorted(mass, uniform(5, 0, at) * mass[-1], "right")] for at in range(100)
    ]
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= 1


# --- the order of operations


def test_greedy_takes_the_smallest_of_the_largest() -> None:
    for temperature in (0.0, 9e-6):
        rows = along(Sampling(temperature, seed=9), 50)
        assert set(tokens_of(np.tile(np.float32([1, 3, 3, 2]), (50, 1)), rows, 4)) == {1}
    assert one([-0.0, 0.0], SamplerRow(Sampling(0.0))) == Sampled(0)


def test_top_p_0_keeps_only_the_top_token() -> None:
    rows = along(Sampling(top_p=0.0, temperature=2.0), 50)
    assert set(tokens_of(np.tile(np.float32([0.1, 0.2, 0.2]), (50, 1)), rows, 3)) == {1}


def test_penalties_count_the_sampled_tokens() -> None:
    row = SamplerRow.resumed(Sampling(0.0, frequency_penalty=0.5, presence_penalty=1.0), 0, [2, 2])
    assert one([0.0, 0.0, 1.9, -9.0], row) == Sampled(0)  # 1.9 - 2 * 0.5 - 1 < 0
    assert one([0.0, 0.0, 2.1, -9.0], row) == Sampled(2)
    reward = SamplerRow.resumed(Sampling(0.0, frequency_penalty=-2.0), 0, [3])
    assert one([0.0, 0.0, 1.9, 0.0], reward) == Sampled(3)


def test_bias_forces_and_removes() -> None:
    rows = along(Sampling(logit_bias=((0, -100.0), (2, 100.0))), 200)
    assert set(tokens_of(np.tile(np.float32([5, 4, -6, 1]), (200, 1)), rows, 4)) == {2}


def test_the_mask_comes_after_the_bias() -> None:
    size = 70
    x = np.zeros(size, dtype=np.float32)
    bias = ((1, 100.0), *((token, -100.0) for token in (31, 32, 69)))
    rows = along(Sampling(logit_bias=bias, temperature=2.0), 300, mask=bits([31, 32, 69], size))
    assert set(tokens_of(np.tile(x, (300, 1)), rows, size)) == {31, 32, 69}
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
    for kind, values in row_kinds(rng, size).items():
        x = values.astype(np.float32)
        for k in (1, 5, 20):
            sampled = sample(
                x[None], [SamplerRow(Sampling(0.0, logprobs=True, top_logprobs=k))], size
            )[0]
            assert isinstance(sampled, Sampled)
            with np.errstate(over="ignore"):
                order = np.argsort(x.max() - x, kind="stable")[:k]
            assert [token for token, _ in sampled.top] == order.tolist(), kind
            exact = x.astype(np.float64) - float(x.max())
            exact -= math.log(np.exp(exact).sum())
            assert [p for _, p in sampled.top] == pytest.approx(
                [max(exact[j], -9999.0) for j in order], rel=1e-6, abs=1e-6
            )
            assert sampled.logprob == sampled.top[0][1]


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
        assert score(x, row, sampled.token, 290) == sampled


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
    scored = score(logits[1], rows[1], 0, 3)
    assert isinstance(scored, RequestError)
    assert scored.code == "nan_logits"


def test_a_mask_that_leaves_nothing_is_an_error() -> None:
    error = one([1.0, 2.0, 3.0], SamplerRow(Sampling(), mask=bits([], 3)))
    assert isinstance(error, RequestError)
    assert error.code == "no_token_allowed"


def test_there_is_one_row_for_each_row_of_logits() -> None:
    with pytest.raises(ValueError, match="zip"):
        sample(np.zeros((2, 3), dtype=np.float32), [SamplerRow(Sampling())], 3)


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

    return [
        SamplerRow.resumed(sampling(at), at % 4, rng.integers(0, size, at).tolist())
        for at in range(count)
    ]


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
    logits = np.zeros((30, 1000), dtype=np.float32)
    drawn = {
        (seed, choice): tuple(
            tokens_of(logits, along(Sampling(seed=seed), 30, choice=choice), 1000)
        )
        for seed in (1, 2)
        for choice in (0, 1)
    }
    assert len(set(drawn.values())) == 4
