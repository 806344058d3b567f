"""Grammars in the batch: masks stay with their rows, replay rebuilds them, and how choices end."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jsonschema
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
from workers.folders.folder import TINY
from workers.grammars.constraint import Function, Shape
from workers.loading.wording import Wording
from workers.words.text import Call

WORDING = Wording.load(TINY)
TOKENIZER, EOS = WORDING.tokenizer, WORDING.eos
Key = tuple[int, int]

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 999}, "ok": {"enum": [True, None]}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}
FUNCTIONS = (Function("f", PERSON), Function("go", None))
BEGINS_CALL = tuple(TOKENIZER.encode("<tool_call>"))


def completion(id: int, shape: Shape, n: int = 1, seed: int = 1, **more: object) -> Completion:
    """A hot one, of n choices, long enough to end by itself."""
    compiled = WORDING.grammars.compile(shape, WORDING.calls if shape.functions else None)
    given = Completion(
        id=id,
        prompt=tuple(range(20, 24 + id % 5)),
        sampling=Sampling(temperature=1.5, seed=seed),
        choices=tuple(map(Choice, range(n))),
        max_tokens=90,
        grammar=compiled.grammar,
        calls=compiled.calls,
        warnings=compiled.warnings,
    )
    return replace(given, **more)  # type: ignore[arg-type]


def batch(seed: int = 0) -> list[Completion]:
    """Free rows, rows of JSON, and rows of calls of every kind, side by side."""
    auto = replace(
        completion(5, Shape(functions=FUNCTIONS), n=2, seed=seed + 5),
        sampling=Sampling(
            temperature=1.2,
            seed=seed + 5,
            logit_bias=tuple((token, 7.0) for token in BEGINS_CALL),
            logprobs=True,
            top_logprobs=2,
        ),
        stops=("e",),
    )
    logged = Sampling(temperature=2, seed=seed, logprobs=True, frequency_penalty=1)
    return [
        completion(0, Shape(), seed=seed, sampling=logged, max_tokens=20, stops=("th",)),
        completion(1, Shape(schema=PERSON, strict=True), n=3, seed=seed + 1),
        completion(2, Shape(schema={"type": "object"}), seed=seed + 2, sampling=logged),
        completion(3, Shape(functions=FUNCTIONS, choice="required"), n=2, seed=seed + 3),
        completion(4, Shape(functions=FUNCTIONS[:1], choice="named"), call_reason="stop"),
        auto,
        completion(6, Shape(), seed=seed + 6, max_tokens=9),
        completion(7, Shape(functions=FUNCTIONS, choice="required", parallel=False), max_tokens=11),
        completion(8, Shape(schema=PERSON, functions=FUNCTIONS), seed=seed + 8),
    ]


@dataclass
class Seen:
    """What one choice gave."""

    tokens: list[int]
    text: str
    entries: list[object]
    calls: dict[int, Call]
    end: Finished | None = None


class Transcript:
    """What a client of the engine sees, by choice."""

    def __init__(self) -> None:
        self.choices: dict[Key, Seen] = defaultdict(lambda: Seen([], "", [], {}))
        self.failed: dict[int, RequestError] = {}
        self.started: list[Started] = []

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Tokens():
                    self._tokens(event)
                case Finished():
                    self.choices[event.id, event.choice].end = event
                case Failed():
                    self.failed[event.id] = event.error
                case Started():
                    self.started.append(event)

    def _tokens(self, event: Tokens) -> None:
        seen = self.choices[event.id, event.choice]
        assert event.start == len(seen.tokens) and seen.end is None
        assert not (event.text and seen.calls), "text after a call"
        seen.tokens += event.tokens
        seen.text += event.text
        seen.entries += event.logprobs
        for delta in event.calls:
            known = seen.calls.get(delta.index)
            assert (known is None) == (delta.name is not None)
            assert delta.index <= len(seen.calls)
            name, before = (known.name, known.arguments) if known else (delta.name or "", "")
            seen.calls[delta.index] = Call(name, before + delta.arguments)

    def result(self) -> dict[Key, Seen]:
        return dict(self.choices)


def run(
    completions: Sequence[Completion], slots: int = 6, park_at: Sequence[int] = ()
) -> Transcript:
    engine = Engine(FakeRunner(TOKENIZER.vocab_size, slots=slots), TOKENIZER, EOS)
    for each in completions:
        engine.admit(each)
    seen, steps = Transcript(), 0
    while not engine.idle:
        seen.take(engine.step())
        steps += 1
        if steps in park_at:
            engine.park()
    return seen


def test_constrained_rows_and_free_ones_do_not_touch_each_other() -> None:
    together = run(batch())
    for each in batch():
        alone = run([each], slots=1)
        for key, seen in alone.result().items():
            assert together.choices[key] == seen
    assert run(batch(), slots=3).result() == run(batch(), slots=16).result() == together.result()
    assert not together.failed


def test_a_free_row_is_the_same_beside_constrained_ones_as_beside_free_ones() -> None:
    free = [each for each in batch() if each.grammar is None]
    assert len(free) == 2
    beside = run(batch())
    for key, seen in run(free).result().items():
        assert beside.choices[key] == seen


def test_what_ends_by_itself_is_as_it_was_asked_for() -> None:
    ended: set[str] = set()
    for seed in range(0, 100, 10):
        for key, seen in run(batch(seed)).result().items():
            assert seen.end is not None and seen.end.text == seen.text
            reason = seen.end.finish_reason
            ended.add(f"{key[0]} {reason}")
            if reason == "length":
                continue
            calls = list(seen.calls.values())
            if key[0] == 1 or (key[0] == 8 and not calls):
                jsonschema.validate(json.loads(seen.text), PERSON)
            for call in calls:
                arguments = json.loads(call.arguments)
                jsonschema.validate(arguments, PERSON if call.name == "f" else {"type": "object"})
            if key[0] in (3, 4, 7):
                assert calls and seen.text == ""
            assert reason == ("tool_calls" if calls and key[0] != 4 else "stop")
            if key[0] in (4, 7):
                assert len(calls) == 1
            if key[0] == 4:
                assert calls[0].name == "f"
            assert not (calls and "<tool_call>" in seen.text)
    print(sorted(ended))
    wanted = {"1 stop", "2 stop", "3 tool_calls", "4 stop", "5 tool_calls", "7 length", "8 stop"}
    assert wanted <= ended


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 80), st.integers(1, 7), st.integers(1, 7), st.integers(0, 5))
def test_resumed_anywhere_it_ends_as_if_undisturbed(
    cut: int, before: int, after: int, seed: int
) -> None:
    golden = run(batch(10 * seed))
    engine = Engine(FakeRunner(TOKENIZER.vocab_size, slots=before), TOKENIZER, EOS)
    for each in batch(10 * seed):
        engine.admit(each)
    seen = Transcript()
    for _ in range(cut):
        seen.take(engine.step())
    again = Engine(FakeRunner(TOKENIZER.vocab_size, slots=after), TOKENIZER, EOS)
    for each in batch(10 * seed):
        open_choices = tuple(
            Choice(c.index, tuple(seen.choices[each.id, c.index].tokens))
            for c in each.choices
            if seen.choices[each.id, c.index].end is None
        )
        if open_choices:
            again.admit(replace(each, choices=open_choices))
    while not again.idle:
        seen.take(again.step())
    assert seen.result() == golden.result()


def test_parked_and_seated_again_it_goes_on() -> None:
    assert run(batch(), 4, park_at=(1, 2, 9, 30, 33, 90)).result() == run(batch(), 4).result()


def test_every_cut_inside_one_call_goes_on_to_the_same_deltas() -> None:
    one = completion(3, Shape(functions=FUNCTIONS[:1], choice="required", parallel=False))
    golden = run([one]).choices[3, 0]
    assert golden.calls and golden.end is not None
    assert golden.end.finish_reason == "tool_calls"
    for cut in range(len(golden.tokens)):
        engine = Engine(FakeRunner(TOKENIZER.vocab_size), TOKENIZER, EOS)
        engine.admit(replace(one, choices=(Choice(0, tuple(golden.tokens[:cut])),)))
        first, seen = run_until(one, cut), Transcript()
        seen.choices[3, 0] = first
        while not engine.idle:
            seen.take(engine.step())
        assert seen.choices[3, 0] == golden


def run_until(one: Completion, cut: int) -> Seen:
    """The choice's first `cut` tokens and what they told."""
    engine = Engine(FakeRunner(TOKENIZER.vocab_size), TOKENIZER, EOS)
    engine.admit(one)
    seen = Transcript()
    while len(seen.choices[one.id, 0].tokens) < cut:
        kept = [e for e in engine.step() if not isinstance(e, Tokens) or e.start < cut]
        seen.take(kept)
    return seen.choices[one.id, 0]


def test_length_wins_inside_a_call_and_leaves_its_arguments_unfinished() -> None:
    shape = Shape(functions=FUNCTIONS[:1], choice="required")
    whole = run([completion(3, shape)]).choices[3, 0]
    for limit in range(1, len(whole.tokens)):
        seen = run([completion(3, shape, max_tokens=limit)]).choices[3, 0]
        assert seen.end is not None and seen.end.finish_reason == "length"
        assert seen.tokens == whole.tokens[:limit] and seen.text == ""
        for index, call in seen.calls.items():
            assert whole.calls[index].name == call.name
            assert whole.calls[index].arguments.startswith(call.arguments)


def test_the_grammar_ends_before_the_length_does() -> None:
    shape = Shape(functions=FUNCTIONS, choice="named")
    shape = replace(shape, functions=FUNCTIONS[:1], parallel=False)
    whole = run([completion(3, shape)]).choices[3, 0]
    exact = run([completion(3, shape, max_tokens=len(whole.tokens))]).choices[3, 0]
    assert exact.end is not None and exact.end.finish_reason == "tool_calls"
    assert exact == whole


def test_a_stop_string_cuts_json_and_is_no_fault() -> None:
    seen = run([completion(1, Shape(schema=PERSON, strict=True), stops=('"ok"',))])
    end = seen.choices[1, 0].end
    assert end is not None and end.finish_reason == "stop"
    assert '"age"' in end.text and "ok" not in end.text and not seen.failed


class Faulty:
    """A grammar whose finished text is never right, and that takes no token `refused`."""

    def __init__(self, inner: object, refused: int | None = None) -> None:
        self._inner, self._refused = inner, refused

    def matcher(self) -> object:
        inner = self._inner.matcher()  # type: ignore[attr-defined]
        refused = self._refused

        class Refusing:
            ended = property(lambda self: inner.ended)

            def mask(self) -> object:
                return inner.mask()

            def advance(self, token: int) -> None:
                if refused is not None and inner_count() == refused:
                    raise RequestError("grammar", "no")
                counted.append(token)
                inner.advance(token)

        counted: list[int] = []

        def inner_count() -> int:
            return len(counted)

        return Refusing()

    def fault(self, text: str, calls: Sequence[Call]) -> str | None:
        return "it is not right" if self._refused is None else None


@pytest.mark.parametrize("refused, code", [(None, "invalid_output"), (3, "grammar")])
def test_a_fault_fails_the_whole_completion_and_no_other(refused: int | None, code: str) -> None:
    wrong = completion(1, Shape(schema=PERSON), n=3)
    wrong = replace(wrong, grammar=Faulty(wrong.grammar, refused))  # type: ignore[arg-type]
    others = [each for each in batch() if each.id != 1]
    seen = run([*others[:2], wrong, *others[2:]])
    assert {id: error.code for id, error in seen.failed.items()} == {1: code}
    golden = run(others).result()
    assert {key: each for key, each in seen.result().items() if key[0] != 1} == golden


def test_warnings_come_with_the_start() -> None:
    hard = {"type": "object", "not": {"required": ["a"]}}
    seen = run([completion(1, Shape(schema=hard), max_tokens=3)])
    (start,) = seen.started
    assert len(start.warnings) == 1 and "response_format" in start.warnings[0]
