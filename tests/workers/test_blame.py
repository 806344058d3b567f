"""A step fails: the guilty leaves alone, its neighbours' tokens are those of an undisturbed run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator.errors import WorkerError
from tests.fake_runner import FakeRunner
from workers.drawing.sampler import Sampling
from workers.engine.blame import MOST_IN_A_ROW, QUIET_SECONDS, Blame
from workers.engine.engine import Engine
from workers.engine.events import Broken, Choice, Completion, Event, Failed, Finished, Tokens
from workers.folders.folder import TINY
from workers.words.tokenizer import Tokenizer

TOKENIZER = Tokenizer(TINY)
EOS = frozenset({2})
GUILTY = 66
"""The first token of a guilty prompt; no other prompt begins so."""

Held = set[int]
Fault = Callable[["FaultyRunner", Sequence[int], int], None]


class FaultyRunner(FakeRunner):
    """Asks `fault` before each call: the first tokens of the rows in it, and their number."""

    def __init__(self, fault: Fault, slots: int = 8, max_length: int = 128) -> None:
        super().__init__(TOKENIZER.vocab_size, slots=slots, max_length=max_length)
        self.fault, self.calls_made, self.end = fault, 0, 0
        self.lengths: list[int] = []

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> npt.NDArray[np.float32]:
        self._ask([tokens[0] if start == 0 else int(self.memory[row, 0])], start + len(tokens))
        return super().prefill(row, tokens, start)

    def extend(self, row: int, tokens: Sequence[int], start: int) -> None:
        self._ask([tokens[0] if start == 0 else int(self.memory[row, 0])], start + len(tokens))
        super().extend(row, tokens, start)

    def prefill_together(
        self, first: int, prompts: Sequence[Sequence[int]]
    ) -> npt.NDArray[np.float32]:
        self._ask([prompt[0] for prompt in prompts])
        return super().prefill_together(first, prompts)

    def _ask(self, prompts: list[int], end: int = 0) -> None:
        self.calls_made, self.lengths, self.end = self.calls_made + 1, [], end
        held = [token for token in self.memory[: self.slots, 0].tolist() if token >= 0]
        self.fault(self, held + prompts, len(held) + len(prompts))

    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> npt.NDArray[np.float32]:
        self.calls_made, self.end = self.calls_made + 1, 0
        batch, self.lengths = len(np.asarray(tokens)), np.asarray(lengths).tolist()
        self.fault(self, self.memory[:batch, 0].tolist(), batch)
        return super().decode(tokens, lengths)


def completions(count: int, guilty: Sequence[int] = (), n: int = 1) -> list[Completion]:
    return [
        Completion(
            id=i,
            prompt=(GUILTY if i in guilty else 20 + i, 31, 32),
            sampling=Sampling(temperature=1.1, seed=i),
            choices=tuple(map(Choice, range(n))),
            max_tokens=12 + i,
        )
        for i in range(count)
    ]


class Seen:
    """What came out, by completion and choice."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.texts: dict[tuple[int, int], str] = {}
        self.ends: dict[tuple[int, int], tuple[str, str]] = {}
        self.failed: dict[int, str] = {}
        self.broken: list[int] = []
        for event in events:
            match event:
                case Tokens():
                    held = self.tokens.setdefault((event.id, event.choice), [])
                    assert event.start == len(held), "a token was emitted twice, or left out"
                    held += event.tokens
                    key = (event.id, event.choice)
                    self.texts[key] = self.texts.get(key, "") + event.text
                case Finished():
                    assert (event.id, event.choice) not in self.ends
                    self.ends[event.id, event.choice] = (event.finish_reason, event.text)
                case Failed():
                    self.failed[event.id] = event.error.code
                case Broken():
                    self.broken.append(event.id)


def run(
    admitted: Sequence[Completion], runner: FakeRunner, clock: Callable[[], float] = perf_counter
) -> tuple[Seen, Engine]:
    engine = Engine(runner, TOKENIZER, EOS, clock=clock)
    blame = Blame(engine)
    for completion in admitted:
        engine.admit(completion)
    events: list[Event] = []
    for _ in range(5000):
        if engine.idle:
            assert not blame.trying or not blame.step()
            return Seen(events), engine
        events += blame.step()
    raise AssertionError("the engine does not come to its end")


def undisturbed(admitted: Sequence[Completion]) -> Seen:
    return run(admitted, FakeRunner(TOKENIZER.vocab_size, slots=8, max_length=200))[0]


def assert_innocents_unharmed(seen: Seen, admitted: Sequence[Completion], guilty: Held) -> None:
    golden = undisturbed(admitted)
    innocent = {key for key in golden.ends if key[0] not in guilty}
    assert innocent
    for key in innocent:
        assert seen.ends[key] == golden.ends[key]
        assert seen.tokens.get(key) == golden.tokens.get(key)
        assert seen.texts.get(key) == golden.texts.get(key)
    for key in seen.tokens:  # what the guilty had emitted is a beginning of what it would have
        golden_tokens = golden.tokens[key]
        assert golden_tokens[: len(seen.tokens[key])] == seen.tokens[key]


def memory(_runner: FaultyRunner, first: Sequence[int], _rows: int) -> None:
    if GUILTY in first:
        raise WorkerError("memory", "failed to allocate memory")


@pytest.mark.parametrize("guilty", [0, 3, 7, 11])
@pytest.mark.parametrize("n", [1, 3])
def test_out_of_memory_fails_the_guilty_alone_and_keeps_the_slots(guilty: int, n: int) -> None:
    admitted = completions(12, guilty=[guilty], n=n)
    runner = FaultyRunner(memory)
    seen, engine = run(admitted, runner)
    assert seen.failed == {guilty: "out_of_memory"} and not seen.broken
    assert_innocents_unharmed(seen, admitted, {guilty})
    assert engine.slots == runner.slots == 8


def test_a_fault_that_comes_late_is_found_at_that_length_again() -> None:
    def late(runner: FaultyRunner, first: Sequence[int], rows: int) -> None:
        for token, length in zip(first, runner.lengths, strict=False):
            if token == GUILTY and length >= 9:
                raise WorkerError("memory", "failed to allocate memory")

    admitted = completions(10, guilty=[4])
    seen, engine = run(admitted, FaultyRunner(late))
    assert seen.failed == {4: "out_of_memory"}
    assert_innocents_unharmed(seen, admitted, {4})
    assert len(seen.tokens[4, 0]) > 3  # it had begun
    assert engine.slots == 8


def test_too_many_rows_halve_the_slots_and_nobody_fails() -> None:
    def crowded(_runner: FaultyRunner, _first: Sequence[int], rows: int) -> None:
        if rows > 3:
            raise WorkerError("memory", "CUDA out of memory")

    admitted = completions(14)
    runner = FaultyRunner(crowded)
    seen, engine = run(admitted, runner)
    assert not seen.failed and not seen.broken
    assert_innocents_unharmed(seen, admitted, set())
    assert engine.slots == runner.slots in (2, 3)


def test_one_request_with_more_choices_than_memory_gets_fewer_slots() -> None:
    def crowded(_runner: FaultyRunner, _first: Sequence[int], rows: int) -> None:
        if rows > 2:
            raise WorkerError("memory", "std::bad_alloc")

    admitted = completions(1, n=8)
    seen, engine = run(admitted, FaultyRunner(crowded))
    assert not seen.failed
    assert_innocents_unharmed(seen, admitted, set())
    assert engine.slots in (1, 2)


def slow() -> Callable[[], float]:
    """Whatever is done takes a third of a second: prompts are computed in small parts."""
    return count(step=0.3).__next__


def long(number: int, guilty: Sequence[int] = ()) -> list[Completion]:
    """Prompts that take many steps to compute beside running rows."""
    return [
        replace(each, prompt=(each.prompt[0], *range(30 + each.id, 120 + each.id)), max_tokens=60)
        for each in completions(number, guilty)
    ]


@pytest.mark.parametrize("guilty", [0, 3, 6])
def test_a_prompt_that_fails_half_way_is_to_blame_and_no_other(guilty: int) -> None:
    begun: list[int] = []

    def later(runner: FaultyRunner, first: Sequence[int], _rows: int) -> None:
        if GUILTY in first and runner.end <= 60:
            begun.append(runner.end)
        elif GUILTY in first:
            raise WorkerError("memory", "failed to allocate memory")

    admitted = long(8, guilty=[guilty])
    runner = FaultyRunner(later, slots=8, max_length=200)
    seen, engine = run(admitted, runner, slow())
    assert begun, "it came in parts"
    assert seen.failed == {guilty: "out_of_memory"} and not seen.broken
    assert_innocents_unharmed(seen, admitted, {guilty})
    assert engine.slots == runner.slots == 8 and runner.held == 0


def test_a_step_that_fails_beside_a_prompt_half_way_harms_neither() -> None:
    halfway: list[bool] = []

    def once(runner: FaultyRunner, _first: Sequence[int], rows: int) -> None:
        begun = runner.lengths and (runner.memory[runner.slots :] >= 0).any()
        if begun and rows > 2 and not halfway:
            halfway.append(True)
            raise RuntimeError("once")

    admitted = long(9)
    seen, _ = run(admitted, FaultyRunner(once, slots=8, max_length=200), slow())
    assert halfway
    assert not seen.failed and not seen.broken
    assert_innocents_unharmed(seen, admitted, set())


def test_too_many_prompts_at_once_halve_the_slots_and_nobody_fails() -> None:
    def crowded(runner: FaultyRunner, first: Sequence[int], rows: int) -> None:
        if not runner.lengths and rows > 2:
            raise WorkerError("memory", "CUDA out of memory")

    admitted = completions(9)
    seen, engine = run(admitted, FaultyRunner(crowded))
    assert not seen.failed and not seen.broken
    assert_innocents_unharmed(seen, admitted, set())
    assert engine.slots in (1, 2)


def test_a_prompt_that_cannot_be_put_into_its_slot_is_to_blame() -> None:
    class Copying(FaultyRunner):
        def copy(self, source: int, target: int, length: int) -> None:
            if self.memory[source, 0] == GUILTY and source >= self.slots:
                raise WorkerError("memory", "failed to allocate memory")
            super().copy(source, target, length)

    admitted = completions(9, guilty=[4], n=2)
    seen, engine = run(admitted, Copying(lambda runner, first, rows: None))
    assert seen.failed == {4: "out_of_memory"}
    assert_innocents_unharmed(seen, admitted, {4})
    assert engine.slots >= 2


def test_a_machine_that_can_compute_prompts_and_no_step_is_found_out() -> None:
    def dead(runner: FaultyRunner, _first: Sequence[int], _rows: int) -> None:
        if runner.lengths:
            raise WorkerError("runtime", "CUDA error: device-side assert triggered")

    with pytest.raises(WorkerError, match="device-side assert"):
        run(long(40), FaultyRunner(dead, slots=8, max_length=200), slow())


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3), WorkerError("runtime", "")])
def test_any_other_error_gives_the_guilty_back_for_another_attempt(error: BaseException) -> None:
    def poison(_runner: FaultyRunner, first: Sequence[int], _rows: int) -> None:
        if GUILTY in first:
            raise error

    admitted = completions(12, guilty=[5, 9], n=2)
    seen, engine = run(admitted, FaultyRunner(poison))
    assert sorted(seen.broken) == [5, 9] and not seen.failed
    assert_innocents_unharmed(seen, admitted, {5, 9})
    assert engine.slots == 8


def test_one_hiccup_blames_nobody() -> None:
    def hiccup(runner: FaultyRunner, _first: Sequence[int], _rows: int) -> None:
        if runner.calls_made == 20:
            raise RuntimeError("once")

    admitted = completions(12)
    seen, _ = run(admitted, FaultyRunner(hiccup))
    assert not seen.failed and not seen.broken
    assert_innocents_unharmed(seen, admitted, set())


def test_where_nothing_works_it_is_the_machine() -> None:
    def dead(_runner: FaultyRunner, _first: Sequence[int], _rows: int) -> None:
        raise WorkerError("runtime", "CUDA error: device-side assert triggered")

    engine = Engine(FaultyRunner(dead), TOKENIZER, EOS)
    blame = Blame(engine)
    for completion in completions(40):
        engine.admit(completion)
    broken = 0
    with pytest.raises(WorkerError, match="device-side assert"):
        for _ in range(1000):
            broken += sum(isinstance(event, Broken) for event in blame.step())
    assert broken == MOST_IN_A_ROW - 1


def test_a_completion_cancelled_on_trial_ends_the_trial() -> None:
    engine = Engine(FaultyRunner(memory), TOKENIZER, EOS)
    blame = Blame(engine)
    for completion in completions(8, guilty=[2]):
        engine.admit(completion)
    events = blame.step()
    while not blame.trying:
        events += blame.step()
    blame.cancel(2)
    assert not blame.trying
    while not engine.idle:
        events += blame.step()
    assert not Seen(events).failed and len(Seen(events).ends) == 7
    assert engine.slots == 8


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class CrowdedRunner(FaultyRunner):
    """Has memory for so many rows; `resizes` are the numbers of slots it was asked to hold."""

    def __init__(self, room: int) -> None:
        super().__init__(self._crowded)
        self.room, self.largest, self.resizes = room, 8, list[int]()

    def _crowded(self, _runner: FaultyRunner, _first: Sequence[int], rows: int) -> None:
        if rows > self.room:
            raise WorkerError("memory", "CUDA out of memory")

    def resize(self, slots: int) -> None:
        self.resizes.append(slots)
        if slots > self.largest:
            raise WorkerError("memory", f"no memory for {slots} slots")
        super().resize(slots)


class Long:
    """Work for hundreds of steps: what was held, and the slots after each number of seconds."""

    def __init__(self, runner: FakeRunner) -> None:
        self.admitted = [replace(each, max_tokens=100) for each in completions(14)]
        self.engine, self.clock = Engine(runner, TOKENIZER, EOS), Clock()
        self.blame = Blame(self.engine, clock=self.clock)
        self.events: list[Event] = []
        for completion in self.admitted:
            self.engine.admit(completion)

    def slots_at(self, seconds: float) -> int:
        """So late, when whatever a step led to has been tried; everybody is on the way."""
        self.clock.now = seconds
        for _ in range(12):
            self.events += self.blame.step()
        while self.blame.trying:
            self.events += self.blame.step()
        assert not self.engine.idle, "it is over too early to show anything"
        return self.engine.slots

    def assert_unharmed(self) -> None:
        while not self.engine.idle:
            self.events += self.blame.step()
        seen = Seen(self.events)
        assert not seen.failed and not seen.broken
        assert_innocents_unharmed(seen, self.admitted, set())


def test_halved_slots_come_back_after_a_quiet_while_and_no_more_than_there_were() -> None:
    runner = CrowdedRunner(room=3)
    work = Long(runner)
    assert work.slots_at(0) == 2
    runner.room = 100
    assert work.slots_at(QUIET_SECONDS - 1) == 2
    assert work.slots_at(QUIET_SECONDS) == 4
    assert work.slots_at(3 * QUIET_SECONDS - 1) == 4, "each doubling is given its time"
    assert work.slots_at(3 * QUIET_SECONDS) == 8
    assert work.slots_at(1000 * QUIET_SECONDS) == 8
    assert runner.resizes == [2, 4, 8]
    work.assert_unharmed()


def test_slots_that_are_too_many_still_are_tried_ever_more_seldom() -> None:
    runner = CrowdedRunner(room=3)
    work = Long(runner)
    assert work.slots_at(0) == 2
    assert work.slots_at(QUIET_SECONDS) == 2, "four were tried, and failed"
    assert runner.resizes == [2, 4, 2]
    assert work.slots_at(3 * QUIET_SECONDS - 1) == 2
    assert runner.resizes == [2, 4, 2]
    assert work.slots_at(3 * QUIET_SECONDS) == 2
    assert runner.resizes == [2, 4, 2, 4, 2]
    work.assert_unharmed()


def test_memory_that_cannot_be_had_again_leaves_the_slots_that_there_are() -> None:
    runner = CrowdedRunner(room=3)
    runner.largest = 3
    work = Long(runner)
    assert work.slots_at(0) == 2
    assert work.slots_at(QUIET_SECONDS) == 2 == runner.slots
    assert runner.resizes == [2, 4, 2]
    work.assert_unharmed()
