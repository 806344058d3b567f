"""What is computed of prompts and what is not: sweeps, common beginnings, short ones together."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_runner import FakeRunner
from tests.workers.test_engine import ENDLESS, EOS, Transcript
from tests.workers.timed_runner import Clock, Costs, TimedRunner
from workers.drawing.sampler import Sampling
from workers.engine.engine import Choice, Completion, Engine
from workers.words.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parents[1] / "parity/models/llama")


def words(*parts: tuple[int, int]) -> tuple[int, ...]:
    """So many tokens of each kind, one after the other: (kind, tokens)."""
    return tuple(20 + (kind * 13 + i) % 101 for kind, count in parts for i in range(count))


def asked(id: int, prompt: tuple[int, ...], n: int = 1, tokens: int = 6) -> Completion:
    sampling = Sampling(seed=id, logit_bias=ENDLESS)
    return Completion(id, prompt, sampling, tuple(map(Choice, range(n))), max_tokens=tokens)


def finish(engine: Engine, completions: Sequence[Completion] = ()) -> Transcript:
    for completion in completions:
        engine.admit(completion)
    seen = Transcript()
    while not engine.idle:
        seen.take(engine.step())
    return seen


def cached(seen: Transcript) -> list[int]:
    return [seen.started[id].cached_tokens for id in sorted(seen.started)]


def test_a_prompt_of_a_sweep_is_computed_once_however_its_points_are_seated() -> None:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=6)
    engine = Engine(runner, TOKENIZER, EOS)
    points = [asked(10 * p + i, words((p, 50 + p)), 1 + i % 2) for p in range(4) for i in range(8)]
    seen = finish(engine, points)
    assert runner.prefills == 4 and runner.prefilled == 50 + 51 + 52 + 53
    assert [seen.started[10 * p].cached_tokens for p in range(4)] == [0] * 4
    assert [seen.started[10 * p + 5].cached_tokens for p in range(4)] == [50, 51, 52, 53]
    prompted = engine.prompted
    assert (prompted.tokens, prompted.cached) == (8 * 206, 7 * 206)
    again = finish(engine, [replace(each, id=1000 + each.id) for each in points])
    assert runner.prefills == 4 and cached(again) == [len(p.prompt) for p in points]


def test_a_common_beginning_is_computed_once() -> None:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=8, max_length=1200)
    engine = Engine(runner, TOKENIZER, EOS)
    shots = [asked(i, words((0, 1024), (1 + i, 76))) for i in range(16)]
    seen = finish(engine, shots)
    assert runner.prefilled == 1100 + 15 * 76
    assert cached(seen) == [0] + [1024] * 15


def test_without_a_cache_the_choices_of_a_request_share_its_prompt_and_nobody_else() -> None:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=16)
    engine = Engine(runner, TOKENIZER, EOS, prefix_bytes=0)
    seen = finish(engine, [asked(i, words((0, 70)), n=5) for i in range(3)])
    assert runner.prefilled == 3 * 70 and cached(seen) == [0, 0, 0]
    assert engine.prompted.held_bytes == 0
    assert len(seen.ends) == 15


def test_choices_that_sit_down_after_their_siblings_have_left_find_the_prompt() -> None:
    for held, computed in ((2**20, 70), (0, 140)):
        runner = FakeRunner(TOKENIZER.vocab_size, slots=2)
        engine = Engine(runner, TOKENIZER, EOS, prefix_bytes=held)
        seen = finish(engine, [asked(1, words((0, 70)), n=4, tokens=1)])
        assert runner.prefilled == computed and len(seen.ends) == 4
        assert seen.started[1].cached_tokens == 0


def test_short_prompts_go_together() -> None:
    clock = Clock()
    runner = TimedRunner(TOKENIZER.vocab_size, clock, Costs(token=0.0001), slots=16, staging=4)
    engine = Engine(runner, TOKENIZER, EOS, clock=clock)
    finish(engine, [asked(99, words((50, 100)))])  # now the pace is known
    runner.calls.clear()
    lengths = [20, 21, 1, 20, 19, 90, 22, 40, 63]
    finish(engine, [asked(i, words((i, length))) for i, length in enumerate(lengths)])
    calls = [lengths for _, lengths, _ in runner.calls]
    assert calls[:4] == [(20, 21), (1,), (20, 19), (90,)] and calls[4] == (22, 40, 63)


def test_those_that_share_a_beginning_do_not_go_together() -> None:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=8, staging=4)
    engine = Engine(runner, TOKENIZER, EOS)
    finish(engine, [asked(i, words((0, 40), (i, 15))) for i in range(4)])
    assert [tokens for _, tokens, _ in runner.calls][-3:] == [(23,), (23,), (23,)]


def test_who_does_not_fit_is_not_overtaken_and_comes_to_its_turn() -> None:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=8, max_length=128, capacity=140)
    engine = Engine(runner, TOKENIZER, EOS)
    order = [asked(0, words((0, 20)), tokens=30)]
    order += [asked(1, words((1, 60)), tokens=60)]  # has no room beside the first
    order += [asked(i, words((i, 5)), tokens=5) for i in range(2, 30)]
    seen = Transcript()
    for each in order:
        engine.admit(each)
    while 1 not in seen.started:
        assert set(seen.started) <= {0} and engine.seated <= 1
        seen.take(engine.step())
    seen.take(engine.step())
    assert engine.seated == 3, "behind it those that fit beside it"
    while not engine.idle:
        seen.take(engine.step())
    assert len(seen.ends) == 30


def test_a_prompt_cancelled_half_way_leaves_no_trace_and_the_next_goes_on_from_it() -> None:
    clock = Clock()
    runner = TimedRunner(TOKENIZER.vocab_size, clock, Costs(token=0.004), slots=4, max_length=400)
    engine = Engine(runner, TOKENIZER, EOS, clock=clock)
    running = asked(0, words((9, 30)), tokens=60)
    long = [asked(i, words((0, 300), (i, 20))) for i in (1, 2)]
    for each in (running, *long):
        engine.admit(each)
    seen = Transcript()
    while not engine.halfway:
        seen.take(engine.step())
    seen.take(engine.step())
    assert engine.halfway and engine.involved == (0, 1) and engine.rows == 2
    engine.cancel(1)
    assert not engine.halfway
    seen.take(engine.step())
    assert seen.started[2].cached_tokens >= 32
    while not engine.idle:
        seen.take(engine.step())
    assert runner.held == 0
    golden = finish(Engine(FakeRunner(TOKENIZER.vocab_size, max_length=400), TOKENIZER, EOS),
                    [running, long[1]])  # fmt: skip
    assert seen.tokens == golden.tokens and seen.ends == golden.ends


def test_a_completion_parked_half_way_is_told_once_and_counted_once() -> None:
    clock = Clock()
    runner = TimedRunner(TOKENIZER.vocab_size, clock, Costs(token=0.01), max_length=400)
    engine = Engine(runner, TOKENIZER, EOS, clock=clock)
    engine.admit(asked(1, words((0, 300))))
    events = engine.step()
    assert engine.halfway and engine.park() == {(1, 0): 0} and not engine.halfway
    while not engine.idle:
        events += engine.step()
    assert [type(event).__name__ for event in events].count("Started") == 1
    assert engine.prompted.tokens == 300


@pytest.mark.parametrize("tokens", [1, 2])
def test_nothing_grows_over_twenty_thousand_requests(tokens: int) -> None:
    limit = 300_000
    runner = FakeRunner(TOKENIZER.vocab_size, slots=16, max_length=64)
    engine = Engine(runner, TOKENIZER, EOS, prefix_bytes=limit)
    sizes: list[int] = []
    for lot in range(100):
        for i in range(100):
            id = lot * 100 + i
            prompt = words((id % 7, 33), (id % 501, 1 + id % 13))
            engine.admit(asked(id, prompt, tokens=tokens))
        finish(engine)
        runner.calls.clear()
        sizes.append(len(engine._prefixes._entries))
        assert runner.held == 0 and engine.prompted.held_bytes <= limit
    assert max(sizes[50:]) <= max(sizes[:50]) * 1.1, sizes
