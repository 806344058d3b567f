"""The measuring itself: what is counted and asked of the runner, and the formula of the limit."""

from dataclasses import replace

import pytest

from tests.fake_runner import FakeRunner
from workers.engine.engine import Engine
from workers.folders.folder import TINY
from workers.measuring import bench
from workers.measuring.bench import (
    ARITHMETIC,
    BANDWIDTH,
    Floor,
    Spread,
    Work,
    bench_decode,
    bench_prefill,
)
from workers.measuring.ceilings import Ceilings
from workers.measuring.costs import Costs
from workers.words.tokenizer import Tokenizer

TOKENIZER = Tokenizer(TINY)
WORK = Work(rows=(1, 3, 8), prompts=(2, 40, 127), seconds=0.2, held=20)
SLOW = Ceilings(read_bandwidth=1e3, fp32_rate=2e3, int4_rate=8e3)
FLOOR = Floor(
    Costs(weight_bytes=400, multiply_adds=100, head_multiply_adds=20, quantized=False),
    SLOW,
    kv_bytes_per_token=2,
)


def measured(
    runner: FakeRunner, work: Work = WORK
) -> tuple[list[bench.Decode], list[bench.Prefill], list[str]]:
    notes: list[str] = []

    def engine() -> Engine:
        return Engine(runner, TOKENIZER, frozenset(), prefix_bytes=0)

    decode = bench_decode(runner, engine, runner.vocab_size, work, notes.append)
    prefill = bench_prefill(runner, engine, runner.vocab_size, work, notes.append)
    return decode, prefill, notes


def runner(**options: int) -> FakeRunner:
    return FakeRunner(TOKENIZER.vocab_size, **options)


def ordered(spread: Spread) -> bool:
    return 0 < spread.least <= spread.median <= spread.most


def test_every_row_and_prompt_is_measured_and_its_figures_agree() -> None:
    decode, prefill, notes = measured(runner())
    assert [each.rows for each in decode] == [1, 3, 8]
    assert [each.tokens for each in prefill] == [2, 40, 127]
    for row in decode:
        assert row.steps >= 3 * bench._LEAST_STEPS
        assert ordered(row.tokens_per_second)
        assert ordered(row.bare_tokens_per_second)
        assert 0 < row.gap_p50_ms <= row.gap_p99_ms
        assert row.overhead > -1
        assert (row.limit, row.fraction) == (None, None)
        limited = FLOOR.decode(row, WORK.held)
        limit, least = FLOOR.of(row.rows, 1, WORK.held + row.steps // 6)
        assert limited.limit == limit
        reached = least * row.bare_tokens_per_second.median / row.rows
        assert limited.fraction == pytest.approx(reached)
    for prompt in prefill:
        assert ordered(prompt.tokens_per_second)
        assert ordered(prompt.first_token_ms)
        assert (prompt.limit, prompt.fraction) == (None, None)
        limited_prompt = FLOOR.prefill(prompt)
        limit, least = FLOOR.of(1, prompt.tokens, 0)
        assert limited_prompt.limit == limit
        reached = least * prompt.tokens_per_second.median / prompt.tokens
        assert limited_prompt.fraction == pytest.approx(reached)
    assert [note for note in notes if note.startswith("decode")] == [
        f"decode, round {round} of 3" for round in (1, 2, 3)
    ]


def test_a_turn_of_the_engine_counts_each_step_in_which_all_rows_sat_but_the_first() -> None:
    for rows in (1, 5):
        for steps in (1, 7):
            engine = Engine(runner(), TOKENIZER, frozenset(), prefix_bytes=0)
            assert len(bench._engine_decode(engine, (5, 6, 7), rows, steps)) == steps
            assert engine.idle


def test_rows_hold_no_more_than_their_length_and_the_capacity() -> None:
    """The runner asserts it; one row more would be one too many."""
    decode, _, _ = measured(
        runner(max_length=32), replace(WORK, prompts=(31,), held=16, seconds=600)
    )
    assert {each.steps for each in decode} == {3 * (32 - 16 - 2)}
    narrow = runner(max_length=128, capacity=8 * 26)
    decode, _, _ = measured(narrow, replace(WORK, rows=(8,), prompts=(2,), seconds=600))
    assert decode[0].steps == 3 * (26 - 20 - 2)


def test_prompts_for_which_the_time_is_too_short_are_left_out_and_named() -> None:
    work = replace(WORK, rows=(1,), prompts=(2, 127), seconds=1e-9)
    assert [each.tokens for each in measured(runner(), work)[1]] == [2, 127]
    _, prefill, notes = measured(runner(), replace(work, every=False))
    assert [each.tokens for each in prefill] == [2]
    assert any("127 tokens left out" in note for note in notes)


def test_the_limit_is_the_slower_of_reading_and_multiplying() -> None:
    """By hand: bytes / 1,000 a second; 2 operations for each multiply-add / 2,000 a second."""
    assert FLOOR.of(1, 1, 10) == (BANDWIDTH, (400 + 10 * 2) / 1e3)
    assert FLOOR.of(8, 1, 10) == (ARITHMETIC, 2 * 8 * 100 / 2e3)
    assert FLOOR.of(8, 1, 1000) == (BANDWIDTH, (400 + 8 * 1000 * 2) / 1e3)
    assert FLOOR.of(1, 50, 0) == (ARITHMETIC, 2 * (50 * 80 + 20) / 2e3)
    quantized = replace(FLOOR, costs=replace(FLOOR.costs, quantized=True))
    assert quantized.of(1, 50, 0) == (ARITHMETIC, 2 * (50 * 80 + 20) / 8e3)
