"""What the engine keeps of a completion on its way, and what one more token does to a choice.

Knows nothing of runners or of who sits where.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import RequestError
from workers.drawing.sampler import Sampled, SamplerRow
from workers.engine.events import Choice, Completion, Event, Failed, Finished, Tokens
from workers.engine.protocols import Logits, TokenSampler
from workers.grammars.constraint import Matcher
from workers.words.calls import CallStream
from workers.words.text import Emitted, TextStream
from workers.words.tokenizer import Tokenizer, logprob_entry


@dataclass(eq=False, slots=True)
class Admitted:
    """A completion on its way: the choices not yet seated, and how far its prompt is.

    `key`: its prompt as the prefix cache knows it. `told`: its start was told. `row`: where `done`
    tokens of the prompt lie (None: nowhere). `logits`: of the prompt's last token, while choices
    wait that begin from them.
    """

    completion: Completion
    limit: int
    waiting: deque[Choice]
    key: bytes
    told: bool = False
    row: int | None = None
    done: int = 0
    logits: Logits | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.completion.prompt)

    @property
    def tokens(self) -> int:
        """Tokens that a row of each choice may come to hold."""
        return len(self.completion.prompt) + self.limit

    @property
    def whole(self) -> bool:
        """All of the prompt lies in `row`."""
        return self.row is not None and self.done == len(self.completion.prompt)


@dataclass(eq=False, slots=True)
class Seat:
    """One choice in a slot. `length`: KV positions filled; `last`: the token to feed next.

    `fresh`: the tokens that were sampled here, after the persisted ones. `matcher`: where the
    choice stands in its grammar (None: it has none).
    """

    admitted: Admitted
    choice: Choice
    row: SamplerRow
    stream: TextStream | CallStream
    matcher: Matcher | None
    length: int
    last: int = -1
    finished: bool = field(default=False)
    fresh: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, admitted: Admitted, choice: Choice, tokenizer: Tokenizer) -> "Seat":
        """A seat at the end of the prompt; the tokens that the choice has already come again."""
        completion = admitted.completion
        return cls(
            admitted,
            choice,
            SamplerRow.resumed(completion.sampling, choice.index, ()),
            _stream(completion, tokenizer),
            completion.grammar.matcher() if completion.grammar else None,
            len(completion.prompt),
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.choice.tokens, *self.fresh)

    @property
    def replaying(self) -> bool:
        return self.row.position < len(self.choice.tokens)

    def constrain(self) -> RequestError | None:
        """Before a token is sampled: renew the mask of what the grammar allows; why it cannot."""
        if self.matcher is not None:
            try:
                self.row.mask = self.matcher.mask()
            except RequestError as error:
                return error
        return None

    def take(self, sampled: Sampled, eos: frozenset[int], tokenizer: Tokenizer) -> Iterator[Event]:
        """The choice's next token, and what follows from it, each event as soon as it is true.

        EOS, stop string, end of the grammar, length: the order of the reference, section 3.3.
        """
        token = sampled.token
        if token in eos:
            yield from self._finish("stop")
            return
        replayed, start = self.replaying, self.row.position
        entry = None
        if sampled.logprob is not None:
            entry = logprob_entry(tokenizer, token, sampled.logprob, sampled.top)
        emitted = self.stream.push(token, entry)
        self.row.advance(token)
        self.last = token
        if not replayed:
            self.fresh.append(token)
            yield self._tokens(start, (token,), emitted)
        yield from self._ended(token, emitted.stopped)

    def _ended(self, token: int, stopped: bool) -> Iterator[Event]:
        if stopped:
            yield from self._finish("stop", cut=True)
            return
        if self.matcher is not None:
            try:
                self.matcher.advance(token)
            except RequestError as error:
                yield self._fail(error)
                return
            if self.matcher.ended:
                yield from self._finish("stop")
                return
        if self.row.position >= self.admitted.limit:
            yield from self._finish("length")

    def _finish(self, reason: str, cut: bool = False) -> Iterator[Event]:
        """End the choice; `cut`: by a stop string, which may leave a text that is not whole."""
        tail = self.stream.finish()
        if tail.stopped:  # the last, broken code point completed a stop string
            reason, cut = "stop", True
        completion, text, calls = self.admitted.completion, self.stream.text, self.stream.calls
        fault = None
        if reason == "stop" and not cut and completion.grammar is not None:
            fault = completion.grammar.fault(text, calls)
        self.finished = True
        if tail.text or tail.logprobs or tail.calls:
            yield self._tokens(self.row.position, (), tail)
        if fault is not None:
            yield self._fail(RequestError("invalid_output", fault))
            return
        if reason == "stop" and calls:
            reason = completion.call_reason
        yield Finished(completion.id, self.choice.index, reason, text)

    def _fail(self, error: RequestError) -> Failed:
        self.finished = True
        return Failed(self.admitted.completion.id, error)

    def _tokens(self, start: int, tokens: tuple[int, ...], emitted: Emitted) -> Tokens:
        return Tokens(
            self.admitted.completion.id,
            self.choice.index,
            start,
            tokens,
            emitted.text,
            tuple(emitted.logprobs or ()),
            emitted.calls,
        )


def next_tokens(
    sampler: TokenSampler, seats: Sequence[Seat], logits: Any, indices: Sequence[int]
) -> list[Sampled | RequestError]:
    """What comes next for each of `seats`, from the row of `logits` with its index.

    Replayed choices get their persisted token, the others are sampled in one call.
    """
    outcomes: list[Sampled | RequestError | None] = []
    for seat, index in zip(seats, indices, strict=True):
        if seat.replaying:
            token = seat.choice.tokens[seat.row.position]
            outcomes.append(sampler.score(logits, index, seat.row, token))
        else:
            outcomes.append(seat.constrain())
    fresh = [place for place, outcome in enumerate(outcomes) if outcome is None]
    rows = [seats[place].row for place in fresh]
    drawn = iter(sampler.sample(logits, [indices[i] for i in fresh], rows) if fresh else ())
    return [next(drawn) if outcome is None else outcome for outcome in outcomes]


def _stream(completion: Completion, tokenizer: Tokenizer) -> TextStream | CallStream:
    if completion.calls is None:
        return TextStream(tokenizer, completion.stops)
    return completion.calls.stream(tokenizer, completion.stops)
