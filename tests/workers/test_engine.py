"""The engine's laws: batch, slot and resume invariance; every slot free after a run."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import RequestError
from tests.fake_runner import FakeRunner
from workers.drawing.sampler import Sampling
from workers.engine.engine import (
    Choice,
    Completion,
    Engine,
    Event,
    Failed,
    Finished,
    Started,
    Tokens,
)
from workers.words.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parents[1] / "parity/models/llama")
EOS = frozenset({7, 8, 9, 10})
ENDLESS = tuple((token, -100.0) for token in sorted(EOS))
Key = tuple[int, int]


class Transcript:
    """What a client of the engine sees, gathered by choice."""

    def __init__(self) -> None:
        self.tokens: dict[Key, list[int]] = defaultdict(list)
        self.text: dict[Key, str] = defaultdict(str)
        self.logprobs: dict[Key, list[dict[str, object]]] = defaultdict(list)
        self.ends: dict[Key, tuple[str, str]] = {}
        self.failed: dict[int, RequestError] = {}
        self.started: dict[int, Started] = {}

    def take(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Tokens():
                    key = event.id, event.choice
                    assert event.start == len(self.tokens[key])
                    self.tokens[key] += event.tokens
                    self.text[key] += event.text
                    self.logprobs[key] += event.logprobs
                case Finished():
                    self.ends[event.id, event.choice] = event.finish_reason, event.text
                case Failed():
                    self.failed[event.id] = event.error
                case Started():
                    self.started[event.id] = event

    def result(self) -> tuple[object, ...]:
        return dict(self.tokens), dict(self.text), dict(self.logprobs), self.ends


def run(completions: list[Completion], slots: int = 4, stop_after: int | None = None) -> Transcript:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=slots)
    engine = Engine(runner, TOKENIZER, EOS)
    for completion in completions:
        engine.admit(completion)
    transcript, steps = Transcript(), 0
    while not engine.idle and steps != stop_after:
        transcript.take(engine.step())
        steps += 1
    if stop_after is None:
        assert engine.idle and engine.seated == 0 and engine.load == 0
    return transcript


def completions(count: int) -> list[Completion]:
    """Every kind of row: greedy, hot, penalised, biased, with stops, logprobs, and n choices."""
    kinds = [
        Sampling(temperature=0),
        Sampling(temperature=1.2, top_p=0.9, seed=11, logprobs=True, top_logprobs=3),
        Sampling(temperature=0.8, frequency_penalty=1.5, presence_penalty=-0.5, seed=-3),
        Sampling(temperature=2, logit_bias=((40, 6.0), (50, 5.0)), seed=2**63 - 1, logprobs=True),
    ]
    return [
        Completion(
            id=100 + i,
            prompt=tuple(range(20, 22 + i)),
            sampling=kinds[i % 4],
            choices=tuple(Choice(c) for c in range(1 + i % 3)),
            max_tokens=5 + 7 * (i % 4),
            stops=("e", "tion") if i % 2 else (),
        )
        for i in range(count)
    ]


def test_a_request_alone_equals_the_same_request_in_a_full_batch() -> None:
    together = run(completions(12), slots=5)
    for completion in completions(12):
        alone = run([completion], slots=1)
        for key in alone.tokens:
            assert alone.tokens[key] == together.tokens[key]
            assert alone.text[key] == together.text[key]
            assert alone.logprobs[key] == together.logprobs[key]
            assert alone.ends[key] == together.ends[key]


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16])
def test_the_number_of_slots_changes_nothing(slots: int) -> None:
    assert run(completions(10), slots).result() == run(completions(10), 4).result()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(1, 6), st.integers(1, 6))
def test_resumed_anywhere_it_ends_as_if_undisturbed(cut: int, before: int, after: int) -> None:
    golden = run(completions(6), slots=4)
    first = run(completions(6), slots=before, stop_after=cut)
    again = []
    for completion in completions(6):
        open_choices = tuple(
            Choice(c.index, tuple(first.tokens.get((completion.id, c.index), ())))
            for c in completion.choices
            if (completion.id, c.index) not in first.ends
        )
        if open_choices:
            again.append(replace(completion, choices=open_choices))
    runner = FakeRunner(TOKENIZER.vocab_size, slots=after)
    engine = Engine(runner, TOKENIZER, EOS)
    for completion in again:
        engine.admit(completion)
    while not engine.idle:
        first.take(engine.step())
    assert first.result() == golden.result()


def test_joined_text_equals_the_end_and_the_decoded_tokens() -> None:
    seen = run(completions(12))
    for key, (reason, text) in seen.ends.items():
        assert seen.text[key] == text
        decoded = b"".join(TOKENIZER.token_bytes(t) for t in seen.tokens[key])
        whole = decoded.decode(errors="replace")
        assert whole.startswith(text) if reason == "stop" else whole == text


def test_choices_share_one_prefill_when_they_fit() -> None:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=8)
    engine = Engine(runner, TOKENIZER, EOS)
    engine.admit(
        Completion(
            id=1,
            prompt=(20, 21, 22),
            sampling=Sampling(seed=5, logit_bias=ENDLESS),
            choices=tuple(map(Choice, range(6))),
            max_tokens=9,
        )
    )
    seen = Transcript()
    while not engine.idle:
        seen.take(engine.step())
    assert runner.prefills == 1
    assert len({tuple(tokens) for tokens in seen.tokens.values()}) == 6
    assert seen.started == {1: Started(1, 3, 0)}


def test_a_request_that_can_never_fit_is_refused_with_the_references_words() -> None:
    engine = Engine(FakeRunner(TOKENIZER.vocab_size, max_length=16), TOKENIZER, EOS)
    too_long = Completion(1, tuple(range(20, 32)), Sampling(), (Choice(0),), max_tokens=5)
    with pytest.raises(RequestError, match=r"maximum context length is 16 .* 17 tokens \(12 in"):
        engine.admit(too_long)
    assert engine.idle


class NanRunner(FakeRunner):
    """Gives NaN for every row whose prompt begins with token 66."""

    def _logits(self, slot, length):  # type: ignore[no-untyped-def]
        logits = super()._logits(slot, length)
        if self.memory[slot, 0] == 66 and length > 6:
            logits[3] = float("nan")
        return logits


def test_nan_fails_one_request_and_leaves_its_neighbours_alone() -> None:
    innocent = completions(5)
    guilty = Completion(
        7, (66, 30, 31), Sampling(seed=1), (Choice(0), Choice(1), Choice(2)), max_tokens=40
    )
    engine = Engine(NanRunner(TOKENIZER.vocab_size, slots=6), TOKENIZER, EOS)
    for completion in [*innocent[:2], guilty, *innocent[2:]]:
        engine.admit(completion)
    seen = Transcript()
    while not engine.idle:
        seen.take(engine.step())
    assert seen.failed[7].code == "nan_logits"
    alone = run(innocent)
    for key, end in alone.ends.items():
        assert seen.ends[key] == end and seen.tokens[key] == alone.tokens[key]


def test_cancel_and_close_free_every_slot() -> None:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=3)
    engine = Engine(runner, TOKENIZER, EOS)
    endless = [
        replace(c, stops=(), sampling=replace(c.sampling, logit_bias=ENDLESS))
        for c in completions(6)
    ]
    for completion in endless:
        engine.admit(completion)
    seen = Transcript()
    seen.take(engine.step())
    assert {id for id, _ in seen.tokens} == {100, 101}
    engine.cancel(101)
    engine.cancel(105)
    while not engine.idle:
        seen.take(engine.step())
    golden = run(endless)
    ended = {id for id, _ in seen.ends}
    assert ended == {100, 102, 103, 104}
    assert all(seen.ends[key] == golden.ends[key] for key in seen.ends)
    engine.admit(completions(1)[0])
    engine.step()
    engine.close()
    assert engine.idle and engine.load == 0


def test_slots_are_limited_and_resized_only_when_nobody_is_seated() -> None:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=4)
    engine = Engine(runner, TOKENIZER, EOS)
    for completion in completions(3):
        engine.admit(replace(completion, stops=(), max_tokens=40))
    engine.step()
    assert engine.seated
    with pytest.raises(RuntimeError, match="are seated: park them first"):
        engine.seat_only([100], 2)
    with pytest.raises(RuntimeError, match="are seated: park them first"):
        engine.resize(2)
    assert (engine.slots, runner.slots) == (4, 4)
    engine.park()
    engine.resize(2)
    engine.seat_only([100], 1)
    assert (engine.slots, runner.slots) == (1, 2)
