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
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import RequestError

SAMPLER_VERSION = 1
"""Part of `system_fingerprint`: raise it with any change that can change a token."""

GREEDY_BELOW = 1e-5
LOWEST_LOGPROB = -9999.0

_COMMON = (2e-4, 1e-5, 5e-7)  # probabilities: in a peaked row few tokens have as much
_TERMS = 64  # of a float32 sum
_AHEAD = 32  # positions whose random numbers are made together
_SMALL = 2048  # a row whose whole list is sorted sooner than its head is found
_BLOCKS = 2048  # whose maxima bound the gap of the n most probable tokens
_FEW = 8  # a mask that allows less than one token in so many makes the row a shorter one

Logits = NDArray[np.float32]
_Side = Literal["left", "right"]  # a sum is reached, or exceeded


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
    return _numbers(seed % 2**64, choice, position // _AHEAD)[position % _AHEAD]


@lru_cache(maxsize=4096)
def _numbers(seed: int, choice: int, block: int) -> list[float]:
    """_AHEAD positions' numbers: a generator costs as much for one. Four outputs a counter."""
    key = np.array([seed, choice], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=block * _AHEAD).random_raw(4 * _AHEAD)[::4]
    numbers: list[float] = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers


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
    room = np.empty((3, known.shape[1]), dtype=np.float32)
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
        return _with_logprobs(raw, peak, np.exp(raw - peak), token, row.sampling.top_logprobs)


def _not_finite(largest: np.float32, place: int) -> RequestError:
    return RequestError("nan_logits", f"row {place}: the largest logit is {largest}")


def _sample_row(raw: Logits, row: SamplerRow, place: int, room: Logits) -> Sampled | RequestError:
    """`room` is float32 [3, len(raw)]: for the adjusted row, its weights, the model's own."""
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
    is_drawn = sampling.temperature >= GREEDY_BELOW and sampling.top_p > 0
    if is_drawn:
        gap = np.subtract(x, x[token], out=room[1, : x.size])
        weight = _weighed(gap, sampling.temperature)
        u = uniform(sampling.seed, row.choice, row.position)
        token = _draw(x, x[token], weight, sampling.temperature, sampling.top_p, u)
    token = token if ids is None else int(ids[token])
    if not sampling.logprobs:
        return Sampled(token)
    if not is_drawn or x is not raw or sampling.temperature != 1:
        weight = _weighed(np.subtract(raw, peak, out=room[2]), 1.0)
    return _with_logprobs(raw, peak, weight, token, sampling.top_logprobs)


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


def _weighed(gap: Logits, temperature: float) -> Logits:
    """exp(gap / temperature), in place."""
    if temperature != 1:
        np.divide(gap, np.float32(temperature), out=gap)
    return np.exp(gap, out=gap)


def _draw(
    x: Logits, peak: np.float32, weight: Logits, temperature: float, top_p: float, u: float
) -> int:
    """One token by inverse CDF over the tokens in order of probability (steps 7 to 10).

    A logit's gap is what it has less than the largest (<= 0), `weight` exp(gap / temperature), both
    float32; sums of weights are float64. Of the list sorted by (gap descending, id) only the head
    matters that holds `share` of the mass. A head is all tokens within some reach; one that holds
    enough gives the very numbers of the full list, since its running sums are the same. The total
    is rough until its error could change the outcome: no token depends on these shortcuts.
    """
    is_nucleus = top_p < 1  # which ends where its mass is reached; a draw exceeds it
    share = top_p if is_nucleus else u
    side: _Side = "left" if is_nucleus else "right"
    total, slack = _rough_total(weight)
    shortcuts = (*_COMMON, (1 - share) / (2 * weight.size)) if weight.size > _SMALL else ()
    for least in (*shortcuts, 0.0):
        reach = temperature * math.log(least * total) if least else -math.inf
        ids, gap = _within(x, peak, reach)
        if ids is not None and weight[ids].sum(dtype=np.float64) < share * total - slack:
            continue
        order = np.sort(gap)[::-1]
        mass = _weighed(order.copy(), temperature).cumsum(dtype=np.float64)
        if slack and _is_in_doubt(mass, share * total, slack, side):
            total, slack = float(weight.sum(dtype=np.float64)), 0.0
        place = int(mass.searchsorted(share * total, side))
        if place < mass.size:
            break
    place = min(place, int(mass.searchsorted(mass[-1])))  # rounding: the last that adds
    if is_nucleus:
        place = min(place, int(mass.searchsorted(u * mass[place], "right")))
    # Only the gaps were sorted: the id follows from the gap and its rank among equals.
    rank = place - int(np.count_nonzero(gap > order[place]))
    found = int(np.flatnonzero(gap == order[place])[rank])
    return found if ids is None else int(ids[found])


def _is_in_doubt(mass: NDArray[np.float64], target: float, slack: float, side: _Side) -> bool:
    """Whether `slack` more or less changes where in the running sums `target` falls."""
    low, high = mass.searchsorted([target - slack, target + slack], side)
    return bool(low != high)


def _rough_total(weight: Logits) -> tuple[float, float]:
    """The sum of all weights in a quarter of the time, and how far it may be off.

    _TERMS float32 terms >= 0 sum up to within _TERMS * 2**-24 of their sum, in whatever order.
    """
    if weight.size <= _SMALL:
        return float(weight.sum(dtype=np.float64)), 0.0
    whole = weight.size // _TERMS * _TERMS
    columns = weight[:whole].reshape(_TERMS, -1).sum(axis=0)
    total = float(columns.sum(dtype=np.float64) + weight[whole:].sum(dtype=np.float64))
    return total, total * _TERMS * 2.0**-23


def _within(x: Logits, peak: np.float32, reach: float) -> tuple[NDArray[np.intp] | None, Logits]:
    """All tokens whose gap is at least `reach`, and their gaps; None: any, since most are."""
    # The logit that lies `reach` below the peak, and a little lower, as the sum is rounded.
    least = float(peak) + reach - 2.0**-20 * (abs(float(peak)) - reach)
    near = x >= least
    if reach == -math.inf or 2 * np.count_nonzero(near) > x.size:
        return None, x - peak
    ids = np.flatnonzero(near)
    gap = x[ids] - peak
    kept = gap >= reach
    return ids[kept], gap[kept]


def _with_logprobs(x: Logits, peak: np.float32, weight: Logits, token: int, n_top: int) -> Sampled:
    """The sampled token with its log-softmax and those of the `n_top` most probable.

    `x` are the model's own logits, `peak` their largest, `weight` exp(x - peak).
    """
    log_total = math.log(weight.sum(dtype=np.float64))

    def logprob(of: int) -> float:
        return max(float(x[of] - peak) - log_total, LOWEST_LOGPROB)

    top = _most_probable(x, peak, n_top) if n_top else []
    return Sampled(token, logprob(token), tuple((each, logprob(each)) for each in top))


def _most_probable(x: Logits, peak: np.float32, n: int) -> list[int]:
    """The `n` tokens with the smallest gaps, by (gap descending, id)."""
    ids, gap = _within(x, peak, _reach_of(x, n) - float(peak))
    first = np.argsort(-gap, kind="stable")[:n]
    found: list[int] = (first if ids is None else ids[first]).tolist()
    return found


def _reach_of(x: Logits, n: int) -> float:
    """A logit that at least `n` tokens reach (if there are as many), and few more."""
    if n >= x.size:
        return -math.inf
    if x.size >= 2 * _BLOCKS >= 2 * n:
        x = x[: x.size // _BLOCKS * _BLOCKS].reshape(-1, _BLOCKS).max(axis=0)
    return float(np.partition(x, -n)[-n])
