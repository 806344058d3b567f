"""How a token is found in a row: as a sort of the whole row finds it, to the last bit.

Two referees: whole_law.py has the kernels' own weights and sorts everything, `exact` has float64.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import whole_law
from tests.sampling_law import KINDS, along, bits, row_of_kind, sampled, tokens_of
from workers.drawing import kernels
from workers.drawing.philox import uniform
from workers.drawing.sampler import HostSampler, Sampled, SamplerRow, Sampling

REAL_VOCABULARY = 151_936
ROOT = Path(__file__).parents[2]


def in_order(x: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens by probability, and the mass up to each."""
    order = np.argsort(-x, kind="stable")
    return order, np.cumsum(whole_law.weights(x, temperature)[order])


def found(order: np.ndarray, mass: np.ndarray, top_p: float, u: float) -> int:
    """The token, where all are sorted."""
    whole = int(mass[-1])
    if top_p < 1:
        full = min(max(1, math.ceil(top_p * float(whole))), whole)
        whole = int(mass[np.searchsorted(mass, full)])
    target = min(int(u * float(whole)), whole - 1)
    return int(order[np.searchsorted(mass, target, "right")])


# --- one result, whichever way to it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [7, 600, 9_011, REAL_VOCABULARY])
def test_a_row_gives_what_the_full_sort_gives(size: int, kind: str) -> None:
    rng = np.random.default_rng(size)
    print(f"seed {size}")
    draws = 6 if size == REAL_VOCABULARY else 15
    x = row_of_kind(kind, rng, size)
    for temperature in (0.1, 1.0, 2.0):
        order, mass = in_order(x, temperature)
        for top_p in (1e-9, 0.5, 0.95, 1 - 1e-12, 1.0):
            sampling = Sampling(temperature, top_p, seed=int(rng.integers(2**40)))
            expected = [
                found(order, mass, top_p, uniform(sampling.seed, 0, at)) for at in range(draws)
            ]
            drawn = tokens_of(x, along(sampling, draws))
            assert drawn == expected, (temperature, top_p)


@settings(max_examples=300, deadline=None)
@given(
    x=st.lists(
        st.floats(-30, 30, width=32) | st.just(-math.inf) | st.sampled_from([0.0, -0.0, 1.0]),
        min_size=1,
        max_size=80,
    ).filter(lambda x: max(x) > -math.inf),
    temperature=st.floats(1e-5, 2),
    top_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_row_equals_the_full_sort(
    x: list[float], temperature: float, top_p: float, seed: int
) -> None:
    outcome = sampled(x, SamplerRow(Sampling(temperature, top_p, seed=seed)))
    expected = whole_law.drawn(np.array(x, np.float32), temperature, top_p, uniform(seed, 0, 0))
    assert outcome == Sampled(expected)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "halves", "steep"])
def test_numbers_on_the_edge_of_two_tokens(
    monkeypatch: pytest.MonkeyPatch, kind: str, top_p: float
) -> None:
    """Where one unit of a sum decides, the shortcuts decide as the full sort does."""
    x = row_of_kind(kind, np.random.default_rng(31), 20_000)
    order, mass = in_order(x, 1.0)
    for place in (0, 1, 2, 5, 40, 200, 900, 2_500, 9_000):
        for by in (-1e-7, -1e-15, 0.0, 1e-15, 1e-7):
            u = min(float(mass[place] / mass[-1] * (1 + by)), 1 - 2**-53)
            monkeypatch.setattr("workers.drawing.sampler.uniform", lambda *_, u=u: u)
            drawn = tokens_of(x, [SamplerRow(Sampling(top_p=top_p))])
            assert drawn == [found(order, mass, top_p, u)], (place, by)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_ends_of_the_random_range(
    monkeypatch: pytest.MonkeyPatch, u: float, top_p: float
) -> None:
    monkeypatch.setattr("workers.drawing.sampler.uniform", lambda *_: u)
    rng = np.random.default_rng(3)
    for size in range(4_090, 4_100):
        for kind in KINDS:
            x = row_of_kind(kind, rng, size)
            expected = found(*in_order(x, 1.0), top_p, u)
            assert tokens_of(x, [SamplerRow(Sampling(top_p=top_p))]) == [expected], kind


@pytest.mark.parametrize("size", [70, 9_011, 40_000])
def test_a_masked_row_is_the_row_of_the_allowed_tokens(size: int) -> None:
    rng = np.random.default_rng(size)
    print(f"seed {size}")
    for kind in KINDS:
        x = row_of_kind(kind, rng, size)
        for kept in (1, 5, size // 9, size // 3, size - 2):
            allowed = np.sort(rng.permutation(np.flatnonzero(np.isfinite(x)))[:kept])
            bias = ((int(allowed[0]), 3.0),) if kept > 1 else ()
            row = SamplerRow(
                Sampling(1.3, 0.9, seed=kept, logit_bias=bias), mask=bits(allowed, size)
            )
            left = np.full(size, -np.inf, np.float32)
            left[allowed] = x[allowed]
            for token, amount in bias:
                left[token] += np.float32(amount)
            expected = found(*in_order(left, 1.3), 0.9, uniform(kept, 0, 0))
            assert tokens_of(x, [row]) == [expected], (kind, kept)
            greedy = SamplerRow(Sampling(0.0, logit_bias=bias), mask=row.mask)
            assert tokens_of(x, [greedy]) == [int(left.argmax())], (kind, kept)


# --- the weights


def test_weights_are_those_of_float64() -> None:
    x = np.linspace(-25, 0, 200_001).astype(np.float32)
    for temperature in (0.3, 1.0, 1.7):
        exact = np.exp(x.astype(np.float64) / temperature)
        weight = whole_law.weights(x, temperature) / kernels.ONE
        likely = exact > 2.0**-16
        assert np.abs(weight[likely] / exact[likely] - 1).max() < 1e-6
        assert np.abs(weight - exact).max() < 3e-7
        assert abs(weight.sum() / exact.sum() - 1) < 1e-8


def exact(x: np.ndarray, row: SamplerRow, us: list[float]) -> list[int]:
    """The tokens for so many numbers, all in float64."""
    sampling = row.sampling
    gap = (x.astype(np.float64) - float(x.max())) / sampling.temperature
    order = np.argsort(-gap, kind="stable")
    mass = np.cumsum(np.exp(gap)[order])
    mass /= mass[-1]
    last = int(np.searchsorted(mass, sampling.top_p)) if sampling.top_p < 1 else x.size - 1
    return [int(order[min(np.searchsorted(mass, u * mass[last], "right"), last)]) for u in us]


@pytest.mark.parametrize("std", [0.6, 4.2], ids=["flat", "peaked"])
@pytest.mark.parametrize("top_p", [0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_tokens_are_those_of_float64(std: float, top_p: float, temperature: float) -> None:
    """Also where a token has a probability of 7e-6; one may lie on an edge."""
    rng = np.random.default_rng(11)
    x = (rng.standard_normal(REAL_VOCABULARY) * std).astype(np.float32)
    rows = along(Sampling(temperature, top_p, seed=5), 500)
    expected = exact(x, rows[0], [uniform(5, 0, at) for at in range(500)])
    differ = sum(a != b for a, b in zip(tokens_of(x, rows), expected, strict=True))
    print(f"{differ} of 500 differ")
    assert differ <= 1


# --- threads, machines, places to keep what was compiled


def test_threads_do_not_change_a_token() -> None:
    rng, size = np.random.default_rng(4), 100_000
    logits = np.stack([row_of_kind(KINDS[at % len(KINDS)], rng, size) for at in range(23)])
    rows = [
        SamplerRow(
            Sampling(1.1, 0.97, 0.0, 0.5, logprobs=at % 3 == 0, top_logprobs=at % 7, seed=at),
            counts={at: 1},
        )
        for at in range(23)
    ]
    alone = [HostSampler(size).sample(logits, [at], [rows[at]])[0] for at in range(23)]
    for threads in (2, 3, 40):
        sampler = HostSampler(size, threads)
        for _ in range(10):
            assert sampler.sample(logits, range(23), rows) == alone


WORK = """
import json, sys
import numpy as np
from tests.sampling_law import KINDS, along, row_of_kind, sample, tokens_of
from workers.drawing.sampler import SamplerRow, Sampling
rng = np.random.default_rng(9)
out = []
for kind in KINDS:
    x = row_of_kind(kind, rng, 30_011)
    for temperature, top_p in ((1.0, 1.0), (0.8, 0.9)):
        out.append(tokens_of(x, along(Sampling(temperature, top_p, seed=3), 25)))
    row = SamplerRow(Sampling(logprobs=True, top_logprobs=20))
    out.append(repr(sample(x[None], [row], x.size)))
print(json.dumps(out))
"""

FULL_DISK = """
import numba.core.caching as c
tried = []
def full(*_):
    tried.append(1)
    raise OSError(28, "No space left on device")
c.IndexDataCacheFile.save = full
"""


def start(work: str = WORK, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", work],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes(process: subprocess.Popen[str]) -> object:
    said, complaints = process.communicate(timeout=250)
    assert process.returncode == 0, complaints
    assert not complaints
    return json.loads(said)


def test_other_processors_give_the_same_tokens(tmp_path: Path) -> None:
    """Compiled for any x86-64 or ARM: other vectors, the same bits. Two compile at once."""
    plain = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    first, second, here = start(**plain), start(**plain), start()
    expected = outcomes(here)
    assert outcomes(first) == expected
    assert outcomes(second) == expected
    assert list(tmp_path.rglob("*.nbi")), "nothing was kept"


def test_without_a_place_to_keep_what_is_compiled_it_works_all_the_same() -> None:
    nowhere = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
    assert outcomes(start(nowhere + WORK)) == outcomes(start())


def test_what_another_version_has_compiled_is_not_used(tmp_path: Path) -> None:
    """Nor does it matter that what is compiled then cannot be kept: the disk is full."""
    say = (
        "import json; from workers.drawing import kernels as k; "
        "print(json.dumps(k.compiled_version()))"
    )
    old = say.replace("print", "k.VERSION = -1; print")
    new = FULL_DISK + say.replace("print", "k.warm_up(); assert tried; print")
    kept = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert outcomes(start(old, **kept)) == -1
    assert outcomes(start(say, **kept)) == -1, "nothing was kept"
    assert outcomes(start(new, **kept)) == kernels.VERSION
