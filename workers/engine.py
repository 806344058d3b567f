"""Slots, a runner and a sampler in a loop: admit completions, step, emit events.

`step` seats waiting choices (prefill), runs one decode call for all seated ones, and accepts one
token for each. A choice that was begun before is replayed: its prompt is prefilled the way it was
the first time and its persisted tokens go through decode steps, riding in the running batch, so
that every number is bitwise what it would have been (design, decision 3).

Knows nothing of jobs, SQL, Celery or templates: token ids and parameters in, events out.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.errors import RequestError
from workers.sampler import Sampled, SamplerRow, Sampling, sample, score
from workers.slots import Slots
from workers.tokenizer import LogprobEntry, TextStream, Tokenizer, logprob_entry

Logits = npt.NDArray[np.float32]


class TokenRunner(Protocol):
    """What the engine asks of a runner (workers/runner.py; a hash of tokens in tests)."""

    slots: int
    max_length: int

    def prefill(self, slot: int, tokens: Sequence[int]) -> Logits: ...
    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> Logits: ...
    def copy(self, source: int, target: int, length: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """One unfinished choice: its index and the tokens that are persisted already."""

    index: int
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One request as the engine sees it; `max_tokens` counts sampled tokens, per choice."""

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    choices: tuple[Choice, ...]
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """A completion's prompt was prefilled; tokens that are computed again are counted apart."""

    id: int
    prompt_tokens: int
    replayed_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """`tokens` from position `start` of a choice, and the text that became safe with them.

    No token and some text: what was held back, released at the end.
    """

    id: int
    choice: int
    start: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[LogprobEntry, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice ended; `text` is the whole of it, `finish_reason` is `stop` or `length`."""

    id: int
    choice: int
    finish_reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A completion cannot go on, through its own fault; none of its choices is seated."""

    id: int
    error: RequestError


Event = Started | Tokens | Finished | Failed


@dataclass(eq=False, slots=True)
class _Admitted:
    """A completion on its way: the choices not yet seated, and the logits they all begin from."""

    completion: Completion
    limit: int
    waiting: deque[Choice]
    prompt_logits: Logits | None = None


@dataclass(eq=False, slots=True)
class _Seat:
    """One choice in a slot. `length`: KV positions filled; `last`: the token to feed next."""

    admitted: _Admitted
    choice: Choice
    row: SamplerRow
    stream: TextStream
    length: int
    last: int = -1
    finished: bool = field(default=False)

    @property
    def replaying(self) -> bool:
        return self.row.position < len(self.choice.tokens)


class Engine:
    """Not thread-safe: one thread admits, steps and cancels."""

    def __init__(self, runner: TokenRunner, tokenizer: Tokenizer, eos: frozenset[int]) -> None:
        """`eos`: the token ids that end a choice and are neither text nor counted."""
        self._runner, self._tokenizer, self._eos = runner, tokenizer, eos
        self._slots: Slots[_Seat] = Slots(runner.slots)
        self._queue: deque[_Admitted] = deque()

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
        self._queue.append(_Admitted(completion, limit, deque(completion.choices)))

    def cancel(self, id: int) -> None:
        """Forget a completion; its slots are free at once."""
        for admitted in [a for a in self._queue if a.completion.id == id]:
            self._queue.remove(admitted)
        for seat in [s for s in self._slots.seats if s.admitted.completion.id == id]:
            self._leave(seat)

    def close(self) -> None:
        """Forget everything that is seated or waits."""
        self._queue.clear()
        self._slots.seats.clear()

    def step(self) -> list[Event]:
        """Seat who waits, decode one token for each seated choice; what happened, in order."""
        events = self._seat_waiting()
        seats = self._slots.seats.copy()
        if seats:
            logits = self._runner.decode([s.last for s in seats], [s.length for s in seats])
            for seat in seats:
                seat.length += 1
            events += self._accept(seats, logits)
        return events

    def _seat_waiting(self) -> list[Event]:
        events: list[Event] = []
        while self._queue and self._slots.free:
            admitted = self._queue[0]
            if admitted.prompt_logits is None:
                events.append(_started(admitted.completion))
            # All choices that fit sit down before the first token, which may end one of them:
            # the others copy its prompt's KV.
            seats: list[_Seat] = []
            while admitted.waiting and self._slots.free:
                seats.append(self._seat(admitted))
            if not admitted.waiting:
                self._queue.popleft()
            logits = admitted.prompt_logits
            assert logits is not None  # noqa: S101  _seat has set it
            events += self._accept(seats, np.broadcast_to(logits, (len(seats), logits.size)))
        return events

    def _seat(self, admitted: _Admitted) -> _Seat:
        completion, choice = admitted.completion, admitted.waiting.popleft()
        row = SamplerRow.resumed(completion.sampling, choice.index, ())
        stream = self._tokenizer.stream(completion.stops)
        seat = _Seat(admitted, choice, row, stream, len(completion.prompt))
        sibling = next((s for s in self._slots.seats if s.admitted is admitted), None)
        slot = self._slots.sit(seat)
        if sibling is not None:
            self._runner.copy(self._slots.slot_of(sibling), slot, len(completion.prompt))
        else:
            admitted.prompt_logits = self._runner.prefill(slot, completion.prompt)
        return seat

    def _accept(self, seats: Sequence[_Seat], logits: Logits) -> list[Event]:
        """One token for each of `seats` from its row of `logits` [len(seats), vocab]."""
        events: list[Event] = []
        failed: list[_Seat] = []
        outcomes = self._next_tokens(seats, logits)
        for seat, sampled in zip(seats, outcomes, strict=True):
            if isinstance(sampled, RequestError):
                failed.append(seat)
                events.append(Failed(seat.admitted.completion.id, sampled))
            else:
                events += self._take(seat, sampled)
        for seat in seats:
            if seat.finished:
                self._leave(seat)
        for id in {seat.admitted.completion.id for seat in failed}:
            self.cancel(id)
        return _once_failed(events)

    def _next_tokens(self, seats: Sequence[_Seat], logits: Logits) -> list[Sampled | RequestError]:
        """Replayed choices get their persisted token, the others are sampled in one call."""
        vocab = self._tokenizer.vocab_size
        fresh = [i for i, seat in enumerate(seats) if not seat.replaying]
        rows = logits if len(fresh) == len(seats) else logits[fresh]
        drawn = iter(sample(rows, [seats[i].row for i in fresh], vocab) if fresh else [])
        outcomes: list[Sampled | RequestError] = []
        for i, seat in enumerate(seats):
            if seat.replaying:
                token = seat.choice.tokens[seat.row.position]
                outcomes.append(score(logits[i], seat.row, token, vocab))
            else:
                outcomes.append(next(drawn))
        return outcomes

    def _take(self, seat: _Seat, sampled: Sampled) -> list[Event]:
        """EOS, then stop string, then length: the order of the reference, section 3.3."""
        if sampled.token in self._eos:
            return self._finish(seat, "stop")
        replayed, start = seat.replaying, seat.row.position
        emitted = seat.stream.push(sampled.token, self._entry(sampled))
        seat.row.advance(sampled.token)
        seat.last = sampled.token
        events: list[Event] = []
        if not replayed:
            id, choice = seat.admitted.completion.id, seat.choice.index
            logprobs = tuple(emitted.logprobs or ())
            events.append(Tokens(id, choice, start, (sampled.token,), emitted.text, logprobs))
        if emitted.stopped:
            events += self._finish(seat, "stop")
        elif seat.row.position >= seat.admitted.limit:
            events += self._finish(seat, "length")
        return events

    def _entry(self, sampled: Sampled) -> LogprobEntry | None:
        if sampled.logprob is None:
            return None
        return logprob_entry(self._tokenizer, sampled.token, sampled.logprob, sampled.top)

    def _finish(self, seat: _Seat, reason: str) -> list[Event]:
        seat.finished = True
        id, choice = seat.admitted.completion.id, seat.choice.index
        tail = seat.stream.finish()
        if tail.stopped:  # the last, broken code point completed a stop string
            reason = "stop"
        events: list[Event] = []
        if tail.text or tail.logprobs:
            logprobs = tuple(tail.logprobs or ())
            events.append(Tokens(id, choice, seat.row.position, (), tail.text, logprobs))
        return [*events, Finished(id, choice, reason, seat.stream.text)]

    def _leave(self, seat: _Seat) -> None:
        move = self._slots.leave(seat)
        if move is not None:
            source, target = move
            self._runner.copy(source, target, self._slots.seats[target].length)


def _started(completion: Completion) -> Started:
    replayed = sum(len(choice.tokens) for choice in completion.choices)
    return Started(completion.id, len(completion.prompt), replayed)


def _once_failed(events: Iterable[Event]) -> list[Event]:
    """Nothing of a completion after its failure, and its failure once."""
    failed: set[int] = set()
    kept: list[Event] = []
    for event in events:
        if event.id not in failed:
            kept.append(event)
        if isinstance(event, Failed):
            failed.add(event.id)
    return kept


def _too_long(room: int, prompt: int, wanted: int | None) -> str:
    completion = wanted or 1
    return (
        f"This model's maximum context length is {room} tokens. However, you requested "
        f"{prompt + completion} tokens ({prompt} in the messages, {completion} in the completion). "
        "Please reduce the length of the messages or completion."
    )
