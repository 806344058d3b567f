"""Slots, a runner and a sampler in a loop: admit completions, step, emit events.

`step` seats waiting choices as far as their prompts may be computed in it (prefilling.py), runs one
decode call for all seated ones, and accepts one token for each. A choice that was begun before is
replayed: its prompt's KV is what it was the first time and its persisted tokens go through decode
steps, riding in the running batch, so that every number is bitwise what it would have been (design,
decision 3).

Who waits is seated in the order of admission, the urgent before the others: where the first does
not fit, nobody behind it sits down. Knows nothing of jobs, SQL, Celery or templates: token ids and
parameters in, events out.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from orchestrator.errors import RequestError
from workers.drawing.sampler import HostSampler, Sampled
from workers.engine.batch import Batch
from workers.engine.events import (
    Choice,
    Completion,
    Event,
    Failed,
    Finished,
    Started,
    Tokens,
    once_failed,
    started,
)
from workers.engine.pace import LEAST, Pace
from workers.engine.prefilling import Computed, Prefilling, Prompted
from workers.engine.prefixes import Prefixes
from workers.engine.protocols import Logits, TokenRunner, TokenSampler
from workers.engine.seats import Admitted, Seat, next_tokens
from workers.engine.waiting import Waiting, longest_first
from workers.words.tokenizer import Tokenizer


class Engine:
    """Not thread-safe: one thread admits, steps and cancels."""

    def __init__(
        self,
        runner: TokenRunner,
        tokenizer: Tokenizer,
        eos: frozenset[int],
        sampler: TokenSampler | None = None,
        *,
        max_stall: float = 0.25,
        prefix_bytes: int = 2**29,
        least_chunk: int = LEAST,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`eos`: the token ids that end a choice and are neither text nor counted.

        `max_stall`: seconds that prompts may keep a running row waiting, a decode call included;
        `prefix_bytes`: of computed prompts that are kept (0: none); `least_chunk`: prompt tokens
        that are worth another call in a step; `clock` tells seconds.
        """
        self._runner, self._tokenizer, self._eos = runner, tokenizer, eos
        self._sampler = sampler or HostSampler(tokenizer.vocab_size)
        self._clock = clock
        self._pace = Pace(max_stall, clock, least_chunk)
        self._prefixes = Prefixes(prefix_bytes)
        self._prompts = Prefilling(runner, self._prefixes, self._pace, self._tell)
        self._batch = Batch(runner)
        self._waiting = Waiting()
        self._events: list[Event] = []
        self._prompt_tokens = self._cached_tokens = 0

    @property
    def slots(self) -> int:
        """Rows that the batch may have."""
        return self._batch.slots

    @property
    def involved(self) -> tuple[int, ...]:
        """The completions in the step: those seated, by slot, and those on their way."""
        both = [*(seat.admitted for seat in self._batch.seats), *self._prompts.begun]
        return tuple(dict.fromkeys(admitted.completion.id for admitted in both))

    @property
    def rows(self) -> int:
        """Rows that the step had in hand: seated, and of prompts on their way."""
        seated = {seat.admitted for seat in self._batch.seats}
        return self.seated + sum(each not in seated for each in self._prompts.begun)

    @property
    def halfway(self) -> bool:
        """Some prompt is computed in part."""
        return bool(self._prompts.begun)

    @property
    def prompted(self) -> Prompted:
        """What became of the prompts so far."""
        cache = self._prefixes
        return Prompted(self._prompt_tokens, self._cached_tokens, cache.held, cache.evicted)

    @property
    def seated(self) -> int:
        """Rows of the next decode call."""
        return len(self._batch.seats)

    @property
    def load(self) -> int:
        """Choices that are seated or wait for a seat; may exceed the slots."""
        return self.seated + self._waiting.choices

    @property
    def urgent(self) -> int:
        """Choices of urgent completions that wait for a seat."""
        return self._waiting.urgent

    @property
    def idle(self) -> bool:
        """Nothing is seated and nothing waits."""
        return not self._batch.seats and not self._waiting.all

    def admit(self, completion: Completion) -> None:
        """Queue a completion; raises RequestError if it can never fit into a slot."""
        self._waiting.add(completion, self._runner.max_length)

    def cancel(self, id: int) -> None:
        """Forget a completion; its slots are free at once."""
        for admitted in [a for a in self._waiting.all if a.completion.id == id]:
            self._drop(admitted)
        for seat in [s for s in self._batch.seats if s.admitted.completion.id == id]:
            self._batch.leave(seat)

    def close(self) -> None:
        """Forget everything that is seated or waits, and the rows' limits but for their number.

        Prompts that were computed are kept.
        """
        self._empty()
        self._events.clear()
        self._waiting = Waiting()

    def forget_prompts(self) -> None:
        """Give the memory of prompts that were computed back."""
        self._prefixes.clear()

    def drain(self) -> list[Event]:
        """What happened in a step before it failed."""
        events, self._events = self._events, []
        return once_failed(events)

    def park(self) -> dict[tuple[int, int], int]:
        """Empty all rows: who was seated waits again, in front, with the tokens sampled so far.

        Nothing is lost or sampled anew: they are replayed like any choice that was begun before. A
        prompt that was computed in part begins anew. Returns how many tokens each choice has that
        was seated, or about to be, by (id, index).
        """
        parked: dict[Admitted, list[Choice]] = {}
        begun = [(each, each.waiting[0]) for each in self._prompts.begun if each.waiting]
        for seat in self._batch.seats:
            choices = parked.setdefault(seat.admitted, [])
            choices.append(Choice(seat.choice.index, seat.tokens))
        self._empty()
        for admitted, choices in reversed(parked.items()):
            if admitted in self._waiting.all:  # some of its choices had no seat yet
                self._waiting.all.remove(admitted)
            whole = sorted([*choices, *admitted.waiting], key=lambda choice: choice.index)
            completion = replace(admitted.completion, choices=tuple(whole))
            self._waiting.all.appendleft(
                Admitted(completion, admitted.limit, deque(whole), admitted.key)
            )
        all = [(a, choice) for a, choices in parked.items() for choice in choices]
        return {(a.completion.id, c.index): len(c.tokens) for a, c in [*all, *begun]}

    def seat_only(self, ids: Iterable[int] | None, slots: int | None = None) -> None:
        """Until further notice nobody else sits down (None: anybody), in so many slots (or all).

        Nobody may be seated: `park` first. Raises RuntimeError if somebody is.
        """
        self._check_empty()
        self._waiting.only = None if ids is None else frozenset(ids)
        self._batch.slots = min(slots or self._runner.slots, self._runner.slots)

    def resize(self, slots: int) -> None:
        """Hold so many slots from now on, when nobody is seated; raises like `seat_only`, or as
        the runner does when it cannot have them."""
        self._check_empty()
        self._runner.resize(slots)
        self._batch.slots = slots

    def position(self, id: int, choice: int) -> int | None:
        """Tokens of a choice that is seated or waits; None: it has left."""
        for seat in self._batch.seats:
            if (seat.admitted.completion.id, seat.choice.index) == (id, choice):
                return seat.row.position
        for admitted in self._waiting.all:
            for waiting in admitted.waiting:
                if (admitted.completion.id, waiting.index) == (id, choice):
                    return 0
        return None

    def step(self) -> list[Event]:
        """Seat who waits, decode one token for each seated choice; what happened, in order.

        Whatever the runner raises goes through; what happened before that is in `drain`.
        """
        if self._waiting.all and self._batch.free:
            self._seat_waiting()
        seats = list(self._batch.seats)
        if seats:
            began = self._clock()
            logits = self._runner.decode([s.last for s in seats], [s.length for s in seats])
            for seat in seats:
                seat.length += 1
            self._accept(seats, logits, range(len(seats)))
            self._pace.decoded(self._clock() - began)
        return self.drain()

    def _check_empty(self) -> None:
        if self._batch.seats:
            raise RuntimeError(f"{self.seated} choices are seated: park them first")

    def _seat_waiting(self) -> None:
        self._pace.begin(running=bool(self._batch.seats))
        seats: list[Seat] = []
        prompts: list[Logits] = []
        indices: list[int] = []
        while (admitted := self._next()) is not None:
            holder = self._batch.holder(admitted.key)
            computed = self._prompts.ready(admitted, holder, self._behind(admitted))
            if computed is None:
                break
            # All that sit down do so before the first token, which may end one of them: the others
            # copy its prompt's KV.
            while admitted.waiting and self._batch.fits(admitted):
                seat, computed = self._seat(admitted, computed)
                seats.append(seat)
                indices.append(len(prompts))
            prompts.append(computed.logits)
            self._prompts.leave(admitted)
            if not admitted.waiting:
                admitted.logits = None
                self._waiting.all.remove(admitted)
        if seats:
            self._accept(seats, np.stack(prompts), indices)

    def _next(self) -> Admitted | None:
        return next(self._waiting.seatable(self._batch.free, self._batch.free_tokens), None)

    def _behind(self, admitted: Admitted) -> Iterator[Admitted]:
        return self._waiting.seatable(self._batch.free, self._batch.free_tokens, admitted)

    def _tell(self, admitted: Admitted, cached: int) -> None:
        if not admitted.told:
            admitted.told = True
            self._events.append(started(admitted.completion, cached))
            self._prompt_tokens += admitted.length
            self._cached_tokens += cached

    def _seat(self, admitted: Admitted, computed: Computed) -> tuple[Seat, Computed]:
        seat = Seat.of(admitted, admitted.waiting[0], self._tokenizer)
        slot = self._batch.sit(seat)
        admitted.waiting.popleft()
        return seat, self._prompts.fill(slot, computed, admitted.length)

    def _accept(self, seats: Sequence[Seat], logits: Any, indices: Sequence[int]) -> None:
        """One token for each of `seats`, from the row of `logits` with its index."""
        failed: set[int] = set()
        outcomes = next_tokens(self._sampler, seats, logits, indices)
        for seat, sampled in zip(seats, outcomes, strict=True):
            for event in self._outcome(seat, sampled):
                self._events.append(event)  # at once: whatever raises, `drain` has it
                if isinstance(event, Failed):
                    failed.add(event.id)
        for seat in seats:
            if seat.finished:
                self._batch.leave(seat)
        for id in failed:
            self.cancel(id)

    def _outcome(self, seat: Seat, sampled: Sampled | RequestError) -> Iterator[Event]:
        if isinstance(sampled, RequestError):
            return iter([Failed(seat.admitted.completion.id, sampled)])
        return seat.take(sampled, self._eos, self._tokenizer)

    def _drop(self, admitted: Admitted) -> None:
        self._prompts.leave(admitted)
        self._waiting.all.remove(admitted)

    def _empty(self) -> None:
        """No row holds anything any more."""
        for admitted in self._waiting.all:
            self._prompts.leave(admitted)
        self._batch.clear()


__all__ = [
    "Choice",
    "Completion",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "Started",
    "Tokens",
    "longest_first",
]
