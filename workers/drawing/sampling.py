"""What is sampled: parameters, a choice's place in the step, and what comes of it.

Knows nothing of how a token is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Edits = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Token ids, and what is added to the logit of each; an id may come twice."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """One request's sampling parameters, resolved: none is missing.

    `logit_bias` holds (token id, bias) pairs, each id once and below the vocabulary size.
    `top_logprobs` counts only when `logprobs` is true. `seed` is taken modulo 2**64.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    seed: int = 0


@dataclass(slots=True)
class SamplerRow:
    """One choice's place in the step.

    `position` is the number of tokens this choice has sampled, `counts` how often each of them;
    both follow from the sampled tokens. `mask`, where given, holds one bit per token, least
    significant first, set where the token is allowed (int32 [ceil(vocabulary / 32)], as
    llguidance fills it); the engine renews it before each step. `penalties` and `bias` are what
    follows for logits from `counts` and `logit_bias`, kept since they are long.
    """

    sampling: Sampling
    choice: int = 0
    position: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    mask: NDArray[np.int32] | None = None
    penalties: "Penalties | None" = field(init=False, repr=False, compare=False, default=None)
    bias: Edits | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.sampling.frequency_penalty or self.sampling.presence_penalty:
            self.penalties = Penalties(self.sampling)
            for token, times in self.counts.items():
                self.penalties.note(token, times)
        if self.sampling.logit_bias:
            ids, amounts = zip(*self.sampling.logit_bias, strict=True)
            self.bias = np.array(ids, np.int64), np.array(amounts, np.float64)

    @classmethod
    def resumed(cls, sampling: Sampling, choice: int, tokens: Sequence[int]) -> "SamplerRow":
        """The row of a choice that has already sampled `tokens`."""
        row = cls(sampling, choice)
        for token in tokens:
            row.advance(int(token))
        return row

    def advance(self, token: int) -> None:
        """Take note of the token just sampled."""
        self.position += 1
        times = self.counts.get(token, 0) + 1
        self.counts[token] = times
        if self.penalties:
            self.penalties.note(token, times)

    def edits(self) -> list[Edits]:
        """Penalties, then bias (section 2.1, steps 3 and 4); valid until the row advances."""
        edits = [self.penalties.edits()] if self.penalties else []
        return edits if self.bias is None else [*edits, self.bias]


class Penalties:
    """What is added to the logits of the tokens that a choice has sampled; grows with them."""

    def __init__(self, sampling: Sampling) -> None:
        self._frequency, self._presence = sampling.frequency_penalty, sampling.presence_penalty
        self._places: dict[int, int] = {}
        self._ids, self._amounts = np.empty(64, np.int64), np.empty(64, np.float64)

    def note(self, token: int, times: int) -> None:
        """`token` was sampled so many times by now."""
        place = self._places.setdefault(token, len(self._places))
        if place == self._ids.size:
            self._ids, self._amounts = np.tile(self._ids, 2), np.tile(self._amounts, 2)
        self._ids[place] = token
        self._amounts[place] = -(times * self._frequency + self._presence)

    def edits(self) -> Edits:
        """Valid until the next token is noted."""
        size = len(self._places)
        return self._ids[:size], self._amounts[:size]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token.

    `logprob` (None unless asked for) and `top` are natural logarithms of the model's own
    probabilities, before bias, penalties, mask and temperature, at least -9999.0. `top` is sorted
    by log-probability descending, then by id, and has `top_logprobs` entries (fewer only if the
    vocabulary is smaller).
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
