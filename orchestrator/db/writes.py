"""What a flush carries: chunks, ends, outcomes, usage; values only.

Knows nothing of SQL or of the engine that fills them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ChunkWrite:
    """New tokens of one choice: int32, shape (n,); n may be 0 in the choice's last chunk.

    `text` is what these tokens released; `logprobs` one entry per token as the API shows them;
    `calls` what came of calls, after the text: {index, name, arguments: ""} once for each, then
    {index, arguments}.
    """

    choice: int
    token_start: int
    token_ids: NDArray[np.int32]
    text: str
    logprobs: Sequence[Mapping[str, object]] | None = None
    calls: Sequence[Mapping[str, object]] | None = None


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """One choice is complete; `text` is the whole of it."""

    choice: int
    finish_reason: str
    text: str


@dataclass(frozen=True, slots=True)
class UsageWrite:
    """Tokens of this attempt so far; each flush replaces the row of the one before."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    replayed_tokens: int


@dataclass(frozen=True, slots=True)
class RequestWrite:
    """What happened to one request since its last flush, under the claim's `epoch`.

    `outcome` is None while it goes on, else "succeeded" or "failed" (then with `error`: code and
    message). `waiting`: claimed, but in no slot yet, so that a crash now is not this request's
    doing. With nothing else in it the write only renews the lease.
    """

    request_id: int
    epoch: int
    attempt: int
    chunks: tuple[ChunkWrite, ...] = ()
    ends: tuple[ChoiceEnd, ...] = ()
    outcome: str | None = None
    error: tuple[str, str] | None = None
    usage: UsageWrite | None = None
    system_fingerprint: str | None = None
    warnings: tuple[str, ...] = ()
    idle_attempts: int | None = None
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class Flushed:
    """Requests whose claim is gone (nothing was written), and those whose job wants them stopped.

    The cancelled ones were written and given back: both kinds only leave their slots.
    """

    lost: frozenset[int]
    cancelled: frozenset[int]
