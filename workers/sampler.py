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

SAMPLER_VERSION = 1
"""Part of `system_fingerprint`: raise it with any change that can change a token."""

GREEDY_BELOW = 1e-5
LOWEST_LOGPROB = -9999.0

_COMMON_TOKEN = 2e-4  # at most 5,000 tokens are at least this probable: a sort of microseconds
_NO_WEIGHT = 1e-300  # far below the smallest float32: every token with any weight is above
_BLOCKS = 2048  # whose minima bound the distance of the n nearest tokens

Logits = NDArray[np.float32]


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


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number of a choice's token at `position`: float64 in [0, 1), 53 bits.

    First output of Philox4x64-10 (Salmon et al. 2011, as in numpy) with the key
    (seed mod 2**64, choice) and the counter `position`.
    """
    key = np.array([seed % 2**64, choice], dtype=np.uint64)
    raw = int(np.random.Philox(key=key, counter=position).random_raw())
    return (raw >> 11) * 2.0**-53


def sample(
    logits: Logits, rows: Sequence[SamplerRow], vocab_size: int
) -> list[Sampled | RequestError]:
    """Sample one token for each row; `rows` are not advanced and `logits` not modified.

    `logits` is float32 [len(rows), >= vocab_size]; columns from `vocab_size` on are padding and
    never looked at. A row that cannot be sampled (code `nan_logits`: a NaN or no finite maximum;
    `no_token_allowed`: its mask leaves nothing) yields its error in its place.
    """
    known = logits[:, :vocab_size]
    peaks = known.argmax(axis=1).tolist()  # the first of a tie; a NaN, where there is one
    with np.errstate(over="ignore"):  # the distance to a logit like -3e38 may become infinite
        return [
            _sample_row(known[place], peak, row, place)
            for place, (row, peak) in enumerate(zip(rows, peaks, strict=True))
        ]


def score(logits: Logits, row: SamplerRow, token: int, vocab_size: int) -> Sampled | RequestError:
    """`token` as `sample` would have reported it: for a choice that replays its tokens.

    `logits` is one row, float32 [>= vocab_size]. The token itself is not questioned.
    """
    raw = logits[:vocab_size]
    peak = int(raw.argmax())
    if not math.isfinite(raw[peak]):
        return _not_finite(raw[peak], 0)
    if not row.sampling.logprobs:
        return Sampled(token)
    with np.errstate(over="ignore"):
        return _with_logprobs(_distance(raw, peak), token, row.sampling.top_logprobs)


def _not_finite(largest: np.float32, place: int) -> RequestError:
    return RequestError("nan_logits", f"row {place}: the largest logit is {largest}")


def _sample_row(raw: Logits, peak: int, row: SamplerRow, place: int) -> Sampled | RequestError:
    if not math.isfinite(raw[peak]):
        return _not_finite(raw[peak], place)
    sampling, x, token = row.sampling, raw, peak
    if _is_adjusted(row):
        x = _adjusted(raw, row)
        token = int(x.argmax())
        if not math.isfinite(x[token]):
            return RequestError("no_token_allowed", f"row {place}: the mask allows no token")
    if sampling.temperature >= GREEDY_BELOW and sampling.top_p > 0:
        u = uniform(sampling.seed, row.choice, row.position)
        token = _draw(_distance(x, token), sampling.temperature, sampling.top_p, u)
    if not sampling.logprobs:
        return Sampled(token)
    return _with_logprobs(_distance(raw, peak), token, sampling.top_logprobs)


def _is_adjusted(row: SamplerRow) -> bool:
    sampling = row.sampling
    penalised = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    return bool(sampling.logit_bias or row.mask is not None or (penalised and row.counts))


def _adjusted(raw: Logits, row: SamplerRow) -> Logits:
    """Penalties, bias, then the mask (section 2.1, steps 3 to 5) on a copy of the row."""
    x, sampling = raw.copy(), row.sampling
    if (sampling.frequency_penalty or sampling.presence_penalty) and row.counts:
        ids = np.fromiter(row.counts.keys(), dtype=np.intp, count=len(row.counts))
        counts = np.fromiter(row.counts.values(), dtype=np.float64, count=len(row.counts))
        x[ids] -= counts * sampling.frequency_penalty + sampling.presence_penalty
    if sampling.logit_bias:
        x[[token for token, _ in sampling.logit_bias]] += [bias for _, bias in sampling.logit_bias]
    if row.mask is not None:
        bits = np.unpackbits(row.mask.view(np.uint8), count=x.size, bitorder="little")
        x[bits == 0] = -np.inf
    return x


def _distance(x: Logits, peak: int) -> Logits:
    """How far each logit lies below the largest: never negative, nor -0.0 (its bits sort)."""
    distance: Logits = (x[peak] + np.float32(0)) - x
    return distance


def _draw(distance: Logits, temperature: float, top_p: float, u: float) -> int:
    """One token by inverse CDF over the tokens in order of probability (steps 7 to 10).

    A token's weight is exp(-distance / temperature) in float32; sums of weights are float64.
    Of the list sorted by (distance, id) only the head matters that holds `needed` of the mass.
    A head is all tokens within some reach; one that holds enough gives the very numbers of the
    full list, since its running sums are the same. First the common tokens are tried; then all
    but those too rare to make up the rest of the mass even together; and, should rounding have
    outwitted this bound, all of them.
    """
    weight = distance / np.float32(-temperature)
    np.exp(weight, out=weight)
    total = float(weight.sum(dtype=np.float64))
    is_nucleus = top_p < 1
    needed = (top_p if is_nucleus else u) * total
    too_rare = (total - needed) / (2 * weight.size)
    for least in (_COMMON_TOKEN * total, too_rare, 0.0):
        head = _nearest(distance, -temperature * math.log(least or _NO_WEIGHT))
        mass = weight[head].cumsum(dtype=np.float64)
        # A nucleus ends where its mass is reached, a draw falls where the mass exceeds it.
        place = int(mass.searchsorted(needed, "left" if is_nucleus else "right"))
        if place < head.size:
            break
    place = min(place, int(mass.searchsorted(mass[-1])))  # rounding: the last that adds
    if is_nucleus:
        place = min(place, int(mass.searchsorted(u * mass[place], "right")))
    return int(head[place])


def _nearest(distance: Logits, reach: float) -> NDArray[np.intp]:
    """The tokens not further than `reach` below the maximum, by (distance, id)."""
    ids = np.flatnonzero(distance <= reach)
    # The bits of a float32 >= 0 sort as it does: with the id below them every key is unique,
    # and any sort, the fastest too, is the stable one.
    keys = distance[ids].view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= ids.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)


def _with_logprobs(distance: Logits, token: int, n_top: int) -> Sampled:
    """The sampled token with its log-softmax and those of the `n_top` most probable."""
    log_total = math.log(np.exp(-distance).sum(dtype=np.float64))

    def logprob(of: int) -> float:
        return max(-float(distance[of]) - log_total, LOWEST_LOGPROB)

    top = _nearest(distance, _reach_of(distance, n_top))[:n_top].tolist() if n_top else []
    return Sampled(token, logprob(token), tuple((each, logprob(each)) for each in top))


def _reach_of(distance: Logits, n: int) -> float:
    """A distance within which at least `n` tokens lie (if there are as many), and few more."""
    if distance.size < 2 * _BLOCKS or n > _BLOCKS:
        return math.inf
    minima = distance[: distance.size // _BLOCKS * _BLOCKS].reshape(-1, _BLOCKS).min(axis=0)
    return float(np.partition(minima, n - 1)[n - 1])
