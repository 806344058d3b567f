"""What goes into the engine and what comes out: completions, and the events of their life.

Values only; knows nothing of slots, runners, jobs or SQL.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.errors import RequestError, WorkerError
from workers.drawing.sampler import Sampling
from workers.grammars.constraint import Grammar
from workers.words.calls import CallFormat
from workers.words.text import CallDelta
from workers.words.tokenizer import LogprobEntry


@dataclass(frozen=True, slots=True)
class Choice:
    """One unfinished choice: its index and the tokens that are persisted already."""

    index: int
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One request as the engine sees it; `max_tokens` counts sampled tokens, per choice.

    `grammar`: what may be sampled and how it must end (None: anything); `calls`: how the model
    writes calls (None: all is text); `call_reason`: the finish reason of a choice that made one;
    `warnings`: what of the request is not kept to; `urgent`: it waits behind no other that is not.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    choices: tuple[Choice, ...]
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    grammar: Grammar | None = None
    calls: CallFormat | None = None
    call_reason: str = "tool_calls"
    warnings: tuple[str, ...] = ()
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A completion's prompt is begun; tokens that are computed again are counted apart.

    `cached_tokens`: of the prompt's, those whose KV was there already.
    """

    id: int
    prompt_tokens: int
    replayed_tokens: int
    warnings: tuple[str, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """`tokens` from position `start` of a choice; the text and calls that became safe with them.

    No token and some text or calls: what was held back, released at the end.
    """

    id: int
    choice: int
    start: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[LogprobEntry, ...]
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice ended; `text` is the whole of its text, without calls.

    `finish_reason` is `stop`, `length`, or the completion's `call_reason`.
    """

    id: int
    choice: int
    finish_reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A completion cannot go on, through its own fault; none of its choices is seated."""

    id: int
    error: RequestError


@dataclass(frozen=True, slots=True)
class Broken:
    """Steps with this completion in them fail, and it may be the machine's fault; it has left."""

    id: int
    error: WorkerError


Event = Started | Tokens | Finished | Failed | Broken


def started(completion: Completion, cached: int = 0) -> Started:
    """A completion begins, with the tokens that its choices have already."""
    replayed = sum(len(choice.tokens) for choice in completion.choices)
    return Started(completion.id, len(completion.prompt), replayed, completion.warnings, cached)


def once_failed(events: Iterable[Event]) -> list[Event]:
    """Nothing of a completion after its failure, and its failure once."""
    failed: set[int] = set()
    kept: list[Event] = []
    for event in events:
        if event.id not in failed:
            kept.append(event)
        if isinstance(event, Failed):
            failed.add(event.id)
    return kept
