"""The mean and its clustered standard error, against hand-computed and textbook cases."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.evaluation.statistics import estimate

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10)), min_size=1, max_size=40)


def test_a_hand_computed_case() -> None:
    # Items a: 1, 1; b: 0, 1; c: 0. n = 5, mean = 3/5. Residual sums: a 0.8, b -0.2, c -0.6;
    # squares 0.64 + 0.04 + 0.36 = 1.04; times G/(G-1) = 3/2 is 1.56; over n² = 25 is 0.0624.
    got = estimate([("a", 1.0), ("a", 1.0), ("b", 0.0), ("b", 1.0), ("c", 0.0)])
    assert got is not None
    assert (got.mean, got.n, got.n_items) == (0.6, 5, 3)
    assert got.standard_error == pytest.approx(0.0624**0.5, rel=1e-12)


def test_one_score_per_item_is_the_unclustered_formula() -> None:
    rng = random.Random(7)
    values = [rng.random() for _ in range(50)]
    got = estimate(enumerate(values))
    assert got is not None
    assert got.standard_error == pytest.approx(statistics.stdev(values) / 50**0.5, rel=1e-12)


def test_copies_of_every_score_add_no_certainty() -> None:
    once = [(item, float(item % 3 == 0)) for item in range(20)]
    single, tripled = estimate(once), estimate(once * 3)
    assert single is not None and tripled is not None
    assert single.standard_error is not None
    assert tripled.standard_error == pytest.approx(single.standard_error, rel=1e-12)
    assert (tripled.n, tripled.n_items) == (60, 20)


def test_scores_that_cancel_within_each_item_leave_no_error() -> None:
    got = estimate([(item, float(half)) for item in range(4) for half in (0, 1)])
    assert got is not None
    assert (got.mean, got.standard_error) == (0.5, 0.0)


def test_one_item_has_a_mean_and_no_error_and_nothing_has_neither() -> None:
    one = estimate([("a", 1.0), ("a", 0.0)])
    assert one is not None
    assert (one.mean, one.standard_error, one.n) == (0.5, None, 2)
    assert estimate([]) is None


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_bit(
    pairs: list[tuple[int, float]], rng: random.Random
) -> None:
    shuffled = pairs[:]
    rng.shuffle(shuffled)
    assert estimate(shuffled) == estimate(pairs)


@given(PAIRS, st.floats(-5, 5), st.floats(0.1, 4))
def test_shift_moves_the_mean_and_scale_scales_the_error(
    pairs: list[tuple[int, float]], shift: float, scale: float
) -> None:
    before = estimate(pairs)
    after = estimate([(item, x * scale + shift) for item, x in pairs])
    assert before is not None and after is not None
    assert after.mean == pytest.approx(before.mean * scale + shift, abs=1e-9)
    if before.standard_error is None:
        assert after.standard_error is None
    else:
        assert after.standard_error == pytest.approx(before.standard_error * scale, abs=1e-9)
