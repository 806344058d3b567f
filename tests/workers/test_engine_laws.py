"""Whatever is reused, cut into chunks, moved or disturbed: a completion's tokens are those it has
alone; and nothing is left in any row."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_runner import FakeRunner
from tests.workers.test_engine import EOS, Transcript
from tests.workers.timed_runner import Clock, Costs, TimedRunner
from workers.drawing.sampler import Sampling
from workers.engine.engine import Choice, Completion, Engine
from workers.engine.pace import LEAST
from workers.words.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parents[1] / "parity/models/llama")
LENGTH = 320


@dataclass(frozen=True)
class Act:
    """What is done before a step: to whom, for those that have a whom."""

    kind: str
    whom: int


PROMPTS = st.builds(
    # Common beginnings of all lengths, also such that end where a block of the cache does.
    lambda common, length, own: tuple(20 + (common * 7 + i) % 90 for i in range(length)) + own,
    st.integers(0, 1),
    st.sampled_from([1, 2, 31, 32, 33, 64, 65, 66, 90, 128]),
    st.lists(st.integers(20, 110), max_size=40).map(tuple),
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.9, 1.6]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    logprobs=st.booleans(),
    seed=st.integers(0, 3),
)
COMPLETIONS = st.builds(
    Completion,
    id=st.just(0),
    prompt=PROMPTS,
    sampling=SAMPLINGS,
    choices=st.integers(1, 3).map(lambda n: tuple(map(Choice, range(n)))),
    max_tokens=st.integers(1, 25),
)
ACTS = st.builds(
    Act,
    st.sampled_from(["admit", "admit", "step", "step", "step", "cancel", "park", "resize"]),
    st.integers(0, 9),
)
COSTS = st.builds(
    Costs,
    call=st.sampled_from([0.0, 0.03]),
    token=st.sampled_from([0.0, 0.001, 0.004, 0.05]),
    step=st.sampled_from([0.0, 0.02]),
)
CACHES = st.sampled_from([0, 5_000, 40_000, 2**29])
MODEL = 4 * TOKENIZER.vocab_size


@cache
def alone(completion: Completion, grain: int) -> Transcript:
    """By itself, each prompt whole and computed anew."""
    runner = FakeRunner(TOKENIZER.vocab_size, len(completion.choices), LENGTH, grain=grain)
    engine = Engine(runner, TOKENIZER, EOS, prefix_bytes=0, max_stall=1e9)
    engine.admit(completion)
    seen = Transcript()
    while not engine.idle:
        seen.take(engine.step())
    return seen


class Disturbed:
    """An engine to which things happen between its steps."""

    def __init__(self, engine: Engine, waiting: list[Completion]) -> None:
        self.engine, self.waiting = engine, waiting
        self.seen, self.cancelled = Transcript(), set[int]()

    def act(self, act: Act) -> None:
        engine = self.engine
        match act.kind:
            case "admit" if self.waiting:
                engine.admit(self.waiting.pop(0))
            case "cancel":
                engine.cancel(act.whom)
                self.cancelled.add(act.whom)
            case "park":
                engine.park()
            case "resize":
                engine.park()
                engine.resize(1 + act.whom % 5)
            case _:
                self.seen.take(engine.step())

    def finish(self) -> None:
        for completion in self.waiting:
            self.engine.admit(completion)
        for _ in range(20_000):
            if self.engine.idle:
                return
            self.seen.take(self.engine.step())
        raise AssertionError("the engine does not come to its end")


@settings(max_examples=150, deadline=None)
@given(
    asked=st.lists(COMPLETIONS, min_size=1, max_size=9),
    acts=st.lists(ACTS, max_size=60),
    slots=st.integers(1, 6),
    staging=st.integers(1, 4),
    spare=st.integers(0, 1000),
    costs=COSTS,
    held=CACHES,
    grain=st.sampled_from([1, 1, 1, 32, 64]),
)
def test_each_yields_what_it_yields_alone(
    asked: list[Completion],
    acts: list[Act],
    slots: int,
    staging: int,
    spare: int,
    costs: Costs,
    held: int,
    grain: int,
) -> None:
    clock = Clock()
    runner = TimedRunner(
        TOKENIZER.vocab_size,
        clock,
        costs,
        slots=slots,
        max_length=LENGTH,
        staging=staging,
        capacity=LENGTH + spare,
        grain=grain,
    )
    engine = Engine(runner, TOKENIZER, EOS, prefix_bytes=held, clock=clock)
    asked = [replace(each, id=id) for id, each in enumerate(asked)]
    disturbed = Disturbed(engine, list(asked))
    for act in acts:
        disturbed.act(act)
        assert engine.prompted.held_bytes <= held
    disturbed.finish()
    assert runner.held == 0, "something is left in a row"
    check(disturbed, asked, grain)


def check(disturbed: Disturbed, asked: list[Completion], grain: int) -> None:
    seen = disturbed.seen
    assert not seen.failed
    for completion in asked:
        golden = alone(completion, grain)
        for choice in completion.choices:
            key = completion.id, choice.index
            tokens, text = seen.tokens.get(key, []), seen.text.get(key, "")
            if completion.id in disturbed.cancelled and key not in seen.ends:
                assert golden.tokens.get(key, [])[: len(tokens)] == tokens
                assert golden.text.get(key, "").startswith(text)
                continue
            assert tokens == golden.tokens.get(key, [])
            assert seen.logprobs.get(key, []) == golden.logprobs.get(key, [])
            assert (text, seen.ends[key]) == (golden.text.get(key, ""), golden.ends[key])


class Gaps:
    """The longest time between two tokens of a choice."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.longest = clock, 0.0
        self.last: dict[tuple[int, int], tuple[int, float]] = {}

    def take(self, transcript: Transcript) -> None:
        for key, tokens in transcript.tokens.items():
            count, at = self.last.get(key, (0, self.clock.now))
            if len(tokens) > count:
                self.longest = max(self.longest, self.clock.now - at)
                self.last[key] = len(tokens), self.clock.now


@settings(max_examples=60, deadline=None)
@given(
    costs=st.builds(
        Costs,
        call=st.floats(0, 0.02),
        token=st.floats(0.00001, 0.006),
        step=st.floats(0, 0.03),
        row=st.floats(0, 0.002),
    ),
    lengths=st.lists(st.integers(1, 280), min_size=2, max_size=14),
    staging=st.integers(1, 4),
)
def test_no_running_row_waits_longer_than_the_bound(
    costs: Costs, lengths: list[int], staging: int
) -> None:
    bound, slots = 0.25, 6
    least = costs.call + (LEAST + 1) * costs.token + costs.step + slots * costs.row
    assert least < bound, "no chunk that is worth a call fits"
    clock = Clock()
    runner = TimedRunner(
        TOKENIZER.vocab_size, clock, costs, slots=slots, max_length=LENGTH, staging=staging
    )
    engine = Engine(runner, TOKENIZER, EOS, max_stall=bound, clock=clock)
    for id, length in enumerate(lengths):
        prompt = tuple(20 + (id * 31 + i) % 97 for i in range(length))
        sampling = Sampling(seed=id, logit_bias=tuple((token, -100.0) for token in sorted(EOS)))
        engine.admit(Completion(id, prompt, sampling, (Choice(0),), max_tokens=30))
    seen, gaps = Transcript(), Gaps(clock)
    while not engine.idle:
        seen.take(engine.step())
        gaps.take(seen)
    assert gaps.longest <= bound


def test_with_nobody_running_prompts_take_as_long_as_they_need_but_look_up_now_and_then() -> None:
    clock = Clock()
    runner = TimedRunner(TOKENIZER.vocab_size, clock, Costs(token=0.01), max_length=LENGTH)
    engine = Engine(runner, TOKENIZER, EOS, clock=clock)
    prompt = tuple(20 + i % 97 for i in range(300))
    engine.admit(Completion(1, prompt, Sampling(temperature=0), (Choice(0),), max_tokens=2))
    steps = 0
    while not engine.idle:
        before = clock.now
        engine.step()
        steps += 1
        assert clock.now - before <= 1.2
    assert 3 <= steps <= 8 and max(tokens[0] for _, tokens, _ in runner.calls) > 40


@pytest.mark.parametrize("bound", [0.01, 0.1, 1.0])
def test_the_shorter_the_bound_the_smaller_the_chunks(bound: float) -> None:
    clock = Clock()
    runner = TimedRunner(TOKENIZER.vocab_size, clock, Costs(token=0.001), max_length=LENGTH)
    engine = Engine(runner, TOKENIZER, EOS, max_stall=bound, clock=clock, prefix_bytes=0)
    bias = tuple((token, -100.0) for token in sorted(EOS))
    for id in range(4):
        prompt = tuple(20 + (id + i) % 97 for i in range(280))
        sampling = Sampling(seed=id, logit_bias=bias)
        engine.admit(Completion(id, prompt, sampling, (Choice(0),), max_tokens=40))
    while not engine.idle:
        engine.step()
    beside = [tokens[0] for _, tokens, _ in runner.calls][-1]
    assert beside <= max(LEAST + 1, bound / 0.001)
    assert min(tokens[0] for _, tokens, _ in runner.calls) >= 2
