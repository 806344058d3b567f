"""Slots, a runner and a sampler in a loop: admit completions, step, emit events.

`step` seats waiting choices (prefill), runs one decode call for all seated ones, and accepts one
token for each. A choice that was begun before is replayed: its prompt is prefilled the way it was
the first time and its persisted tokens go through decode steps, riding in the running batch, so
that every number is bitwise what it would have been (design, decision 3).

Knows nothing of jobs, SQL, Celery or templates: token ids and parameters in, events out.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.errors import RequestError
from workers.events import (
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
from workers.sampler import Sampled, sample, score
from workers.seats import Admitted, Seat
from workers.slots import Slots
from workers.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]


class TokenRunner(Protocol):
    """What the engine asks of a runner (workers/runner.py; a hash of tokens in tests)."""

    slots: int
    max_length: int

    def prefill(self, slot: int, tokens: Sequence[int]) -> Logits: ...
    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> Logits: ...
    def copy(self, source: int, target: int, length: int) -> None: ...
    def resize(self, slots: int) -> None: ...


class Engine:
    """Not thread-safe: one thread admits, steps and cancels."""

    def __init__(self, runner: TokenRunner, tokenizer: Tokenizer, eos: frozenset[int]) -> None:
        """`eos`: the token ids that end a choice and are neither text nor counted."""
        self._runner, self._tokenizer, self._eos = runner, tokenizer, eos
        self._slots: Slots[Seat] = Slots(runner.slots)
        self._queue: deque[Admitted] = deque()
        self._only: frozenset[int] | None = None
        self._seating: Admitted | None = None
        self._events: list[Event] = []

    @property
    def slots(self) -> int:
        """Rows that the batch may have."""
        return self._slots.count

    @property
    def involved(self) -> tuple[int, ...]:
        """The completions in the step: those seated, by slot, and the one that is sitting down."""
        seated = [seat.admitted for seat in self._slots.seats]
        both = [*seated, self._seating] if self._seating else seated
        return tuple(dict.fromkeys(admitted.completion.id for admitted in both))

    @property
    def seated(self) -> int:
        """Rows of the next decode call."""
        return len(self._slots.seats)

    @property
    def load(self) -> int:
        """Choices that are seated or wait for a seat; may exceed the slots."""
        return self.seated + sum(len(admitted.waiting) for admitted in self._queue)

    @property
    def idle(self) -> bool:
        """Nothing is seated and nothing waits."""
        return not self._slots.seats and not self._queue

    def admit(self, completion: Completion) -> None:
        """Queue a completion; raises RequestError if it can never fit into a slot."""
        prompt, room = len(completion.prompt), self._runner.max_length
        wanted = completion.max_tokens
        if prompt == 0:
            raise RequestError("empty_prompt", "The chat template rendered no tokens.")
        if prompt + (wanted or 1) > room:
            raise RequestError("context_length_exceeded", _too_long(room, prompt, wanted))
        limit = wanted or room - prompt
        self._queue.append(Admitted(completion, limit, deque(completion.choices)))

    def cancel(self, id: int) -> None:
        """Forget a completion; its slots are free at once."""
        for admitted in [a for a in self._queue if a.completion.id == id]:
            self._queue.remove(admitted)
        for seat in [s for s in self._slots.seats if s.admitted.completion.id == id]:
            self._leave(seat)

    def close(self) -> None:
        """Forget everything that is seated or waits, and the rows' limits but for their number."""
        self._queue.clear()
        self._slots.seats.clear()
        self._events.clear()
        self._only = self._seating = None

    def drain(self) -> list[Event]:
        """What happened in a step before it failed."""
        events, self._events = self._events, []
        return once_failed(events)

    def park(self) -> dict[tuple[int, int], int]:
        """Empty all slots: who was seated waits again, in front, with the tokens sampled so far.

        Nothing is lost or sampled anew: they are replayed like any choice that was begun before.
        Returns how many tokens each parked choice has, by (id, index).
        """
        parked: dict[Admitted, list[Choice]] = {}
        for seat in self._slots.seats:
            choices = parked.setdefault(seat.admitted, [])
            choices.append(Choice(seat.choice.index, seat.tokens))
        self._slots.seats.clear()
        for admitted, choices in reversed(parked.items()):
            if admitted in self._queue:  # some of its choices had no seat yet
                self._queue.remove(admitted)
            whole = sorted([*choices, *admitted.waiting], key=lambda choice: choice.index)
            completion = replace(admitted.completion, choices=tuple(whole))
            self._queue.appendleft(Admitted(completion, admitted.limit, deque(whole)))
        return {(a.completion.id, c.index): len(c.tokens) for a, cs in parked.items() for c in cs}

    def seat_only(self, ids: Iterable[int] | None, slots: int | None = None) -> None:
        """Until further notice nobody else sits down (None: anybody), in so many slots (or all).

        Nobody may be seated: `park` first. Raises RuntimeError if somebody is.
        """
        self._check_empty()
        self._only = None if ids is None else frozenset(ids)
        self._slots.count = min(slots or self._runner.slots, self._runner.slots)

    def resize(self, slots: int) -> None:
        """Hold so many slots from now on, when nobody is seated; raises like `seat_only`, or as
        the runner does when it cannot have them."""
        self._check_empty()
        self._runner.resize(slots)
        self._slots.count = slots

    def position(self, id: int, choice: int) -> int | None:
        """Tokens of a choice that is seated or waits; None: it has left."""
        for seat in self._slots.seats:
            if (seat.admitted.completion.id, seat.choice.index) == (id, choice):
                return seat.row.position
        for admitted in self._queue:
            for waiting in admitted.waiting:
                if (admitted.completion.id, waiting.index) == (id, choice):
                    return 0
        return None

    def step(self) -> list[Event]:
        """Seat who waits, decode one token for each seated choice; what happened, in order.

        Whatever the runner raises goes through; what happened before that is in `drain`.
        """
        self._seat_waiting()
        seats = self._slots.seats.copy()
        if seats:
            logits = self._runner.decode([s.last for s in seats], [s.length for s in seats])
            for seat in seats:
                seat.length += 1
            self._accept(seats, logits)
        return self.drain()

    def _check_empty(self) -> None:
        if self._slots.seats:
            raise RuntimeError(f"{self.seated} choices are seated: park them first")

    def _seat_waiting(self) -> None:
        while self._slots.free and (admitted := self._next()) is not None:
            self._seating = admitted
            if admitted.prompt_logits is None:
                self._events.append(started(admitted.completion))
            # All choices that fit sit down before the first token, which may end one of them:
            # the others copy its prompt's KV.
            seats: list[Seat] = []
            while admitted.waiting and self._slots.free:
                seats.append(self._seat(admitted))
            if not admitted.waiting:
                self._queue.remove(admitted)
            logits = admitted.prompt_logits
            assert logits is not None  # noqa: S101  _seat has set it
            self._accept(seats, np.broadcast_to(logits, (len(seats), logits.size)))
        self._seating = None

    def _next(self) -> Admitted | None:
        """Who sits down next."""
        if self._only is None:
            return self._queue[0] if self._queue else None
        return next((a for a in self._queue if a.completion.id in self._only), None)

    def _seat(self, admitted: Admitted) -> Seat:
        completion, choice = admitted.completion, admitted.waiting[0]
        seat = Seat.of(admitted, choice, self._tokenizer)
        sibling = next((s for s in self._slots.seats if s.admitted is admitted), None)
        slot = self._slots.sit(seat)
        admitted.waiting.popleft()
        if sibling is not None:
            self._runner.copy(self._slots.slot_of(sibling), slot, len(completion.prompt))
        else:
            admitted.prompt_logits = self._runner.prefill(slot, completion.prompt)
        return seat

    def _accept(self, seats: Sequence[Seat], logits: Logits) -> None:
        """One token for each of `seats` from its row of `logits` [len(seats), vocab]."""
        failed: set[int] = set()
        outcomes = self._next_tokens(seats, logits)
        for seat, sampled in zip(seats, outcomes, strict=True):
            for event in self._outcome(seat, sampled):
                self._events.append(event)  # at once: whatever raises, `drain` has it
                if isinstance(event, Failed):
                    failed.add(event.id)
        for seat in seats:
            if seat.finished:
                self._leave(seat)
        for id in failed:
            self.cancel(id)

    def _outcome(self, seat: Seat, sampled: Sampled | RequestError) -> Iterator[Event]:
        if isinstance(sampled, RequestError):
            return iter([Failed(seat.admitted.completion.id, sampled)])
        return seat.take(sampled, self._eos, self._tokenizer)

    def _next_tokens(self, seats: Sequence[Seat], logits: Logits) -> list[Sampled | RequestError]:
        """Replayed choices get their persisted token, the others are sampled in one call."""
        vocab = self._tokenizer.vocab_size
        outcomes: dict[int, Sampled | RequestError] = {}
        for i, seat in enumerate(seats):
            if seat.replaying:
                token = seat.choice.tokens[seat.row.position]
                outcomes[i] = score(logits[i], seat.row, token, vocab)
            elif (refused := seat.constrain()) is not None:
                outcomes[i] = refused
        fresh = [i for i in range(len(seats)) if i not in outcomes]
        if fresh:
            rows = logits if len(fresh) == len(seats) else logits[fresh]
            drawn = sample(rows, [seats[i].row for i in fresh], vocab)
            outcomes |= zip(fresh, drawn, strict=True)
        return [outcomes[i] for i in range(len(seats))]

    def _leave(self, seat: Seat) -> None:
        move = self._slots.leave(seat)
        if move is not None:
            source, target = move
            self._runner.copy(source, target, self._slots.seats[target].length)


def _too_long(room: int, prompt: int, wanted: int | None) -> str:
    completion = wanted or 1
    return (
        f"This model's maximum context length is {room} tokens. However, you requested "
        f"{prompt + completion} tokens ({prompt} in the messages, {completion} in the completion). "
        "Please reduce the length of the messages or completion."
    )


__all__ = ["Choice", "Completion", "Engine", "Event", "Failed", "Finished", "Started", "Tokens"]
