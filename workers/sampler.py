"""Logits and parameters to tokens, row by row of the running batch; pure numpy.

Knows nothing of slots, models, text or grammars: a row is an array of logits, the parameters of
its request, the tokens its choice has sampled so far, and perhaps a mask of allowed tokens.

The order of operations is docs/chat-completions-streaming.md section 2.1. A row's token is a
function of that row alone (its logits, parameters, counts, choice and position): every reduction
runs over one row in the order of token ids, and the random number is counter-based, so neither
the batch, nor the slot, nor a resumption can change it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import RequestError
from workers.drawing import Logits, draw, most_probable, sum_of_weights
from workers.philox import uniform

SAMPLER_VERSION = 1
"""Part of `system_fingerprint`: raise it with any change that can change a token."""

GREEDY_BELOW = 1e-5
LOWEST_LOGPROB = -9999.0

_FEW = 8  # a mask that allows less than one token in so many makes the row a shorter one


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
    llguidance fills it); the engine renews it before each step.
    """

    sampling: Sampling
    choice: int = 0
    position: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    mask: NDArray[np.int32] | None = None

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
        self.counts[token] = self.counts.get(token, 0) + 1


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


def sample(
    logits: Logits, rows: Sequence[SamplerRow], vocab_size: int
) -> list[Sampled | RequestError]:
    """Sample one token for each row; `rows` are not advanced and `logits` not modified.

    `logits` is float32 [len(rows), >= vocab_size]; columns from `vocab_size` on are padding and
    never looked at. A row that cannot be sampled (code `nan_logits`: a NaN or no finite maximum;
    `no_token_allowed`: its mask leaves nothing) yields its error in its place.
    """
    known = logits[:, :vocab_size]
    # Memory that all rows share: arrays of this size cost more to get than to fill.
    room = np.empty((2, known.shape[1]), dtype=np.float32)
    with np.errstate(over="ignore"):  # the gap to a logit like -3e38 may become infinite
        return [
            _sample_row(raw, row, place, room)
            for place, (raw, row) in enumerate(zip(known, rows, strict=True))
        ]


def score(logits: Logits, row: SamplerRow, token: int, vocab_size: int) -> Sampled | RequestError:
    """`token` as `sample` would have reported it: for a choice that replays its tokens.

    `logits` is one row, float32 [>= vocab_size]. The token itself is not questioned.
    """
    raw = logits[:vocab_size]
    peak = raw[raw.argmax()]
    if not math.isfinite(peak):
        return _not_finite(peak, 0)
    if not row.sampling.logprobs:
        return Sampled(token)
    with np.errstate(over="ignore"):
        total = sum_of_weights(raw, peak, 1.0, np.empty_like(raw))
        return _with_logprobs(raw, peak, total, token, row.sampling.top_logprobs)


def _not_finite(largest: np.float32, place: int) -> RequestError:
    return RequestError("nan_logits", f"row {place}: the largest logit is {largest}")


def _sample_row(raw: Logits, row: SamplerRow, place: int, room: Logits) -> Sampled | RequestError:
    """`room` is float32 [2, len(raw)]: for the adjusted row, and for weights."""
    token = int(raw.argmax())  # the first of a tie; a NaN, where there is one
    peak = raw[token]
    if not math.isfinite(peak):
        return _not_finite(peak, place)
    sampling, x, ids = row.sampling, raw, None
    if _is_adjusted(row):
        x, ids = _adjusted(raw, row, room[0])
        token = int(x.argmax()) if x.size else 0
        if not x.size or not math.isfinite(x[token]):
            return RequestError("no_token_allowed", f"row {place}: the mask allows no token")
    own = sum_of_weights(raw, peak, 1.0, room[1]) if sampling.logprobs else None
    if sampling.temperature >= GREEDY_BELOW and sampling.top_p > 0:
        total = own if x is raw and sampling.temperature == 1 else None
        u = uniform(sampling.seed, row.choice, row.position)
        scratch = room[1, : x.size]
        token = draw(x, x[token], sampling.temperature, sampling.top_p, u, scratch, total)
    token = token if ids is None else int(ids[token])
    if own is None:
        return Sampled(token)
    return _with_logprobs(raw, peak, own, token, sampling.top_logprobs)


def _is_adjusted(row: SamplerRow) -> bool:
    sampling = row.sampling
    penalised = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    return bool(sampling.logit_bias or row.mask is not None or (penalised and row.counts))


def _adjusted(raw: Logits, row: SamplerRow, x: Logits) -> tuple[Logits, NDArray[np.intp] | None]:
    """Penalties, bias, then the mask (section 2.1, steps 3 to 5), on a copy of the row in `x`.

    Where the mask allows few tokens only those are returned, and their ids beside them.
    """
    sampling = row.sampling
    np.copyto(x, raw)
    if (sampling.frequency_penalty or sampling.presence_penalty) and row.counts:
        ids = np.fromiter(row.counts.keys(), dtype=np.intp, count=len(row.counts))
        counts = np.fromiter(row.counts.values(), dtype=np.float64, count=len(row.counts))
        x[ids] -= counts * sampling.frequency_penalty + sampling.presence_penalty
    if sampling.logit_bias:
        x[[token for token, _ in sampling.logit_bias]] += [bias for _, bias in sampling.logit_bias]
    if row.mask is None:
        return x, None
    forbidden = np.unpackbits((~row.mask).view(np.uint8), count=x.size, bitorder="little")
    forbidden = forbidden.view(np.bool_)
    if (x.size - np.count_nonzero(forbidden)) * _FEW < x.size:
        allowed = np.flatnonzero(~forbidden)
        return x[allowed], allowed
    np.copyto(x, -np.inf, where=forbidden)
    return x, None


def _with_logprobs(x: Logits, peak: np.float32, total: float, token: int, n_top: int) -> Sampled:
    """The sampled token with its log-softmax and those of the `n_top` most probable.

    `x` are the model's own logits, `peak` their largest, `total` the sum of exp(x - peak).
    """
    log_total = math.log(total)

    def logprob(of: int) -> float:
        return max(float(x[of] - peak) - log_total, LOWEST_LOGPROB)

    top = most_probable(x, peak, n_top) if n_top else []
    return Sampled(token, logprob(token), tuple((each, logprob(each)) for each in top))
