"""One token drawn from a row of logits, and the row's most probable ones; pure numpy.

Knows nothing of requests, penalties or masks: a row is an array of logits and its largest. What
is drawn is what a stable sort of the whole row gives; no token depends on the shortcuts.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_COMMON = (2e-4, 1e-5, 5e-7)  # probabilities: in a peaked row few tokens have as much
_TERMS = 32  # of a float32 sum
_SMALL = 2048  # a row whose whole list is sorted sooner than its head is found
_BLOCKS = 2048  # whose maxima bound the gap of the n most probable tokens
_UNSHIFTED = 40.0  # the largest logit may be so far from 0 and no weight that counts is lost

Logits = NDArray[np.float32]
_REACHED: Literal["left"] = "left"  # where a running sum is at least, or more than, so much
_EXCEEDED: Literal["right"] = "right"


def _has_wide_exp2() -> bool:
    found = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", ())
    return not {"AVX512_SKX", "X86_V4"}.isdisjoint(found)  # as numpy called it before, and since


# With AVX-512 numpy's exp2 takes half the time of its exp; elsewhere several times as long.
_power, _BASE = (np.exp2, 2.0) if _has_wide_exp2() else (np.exp, math.e)


def draw(
    x: Logits,
    peak: np.float32,
    temperature: float,
    top_p: float,
    u: float,
    room: Logits,
    total: float | None = None,
) -> int:
    """One token by inverse CDF over the tokens in order of probability (steps 7 to 10).

    A logit's gap is what it has less than `peak`, the largest (<= 0), its weight
    exp(gap / temperature), both float32; sums of weights are float64. `total` is the sum of all, if
    known. `room`, as long as `x`, is overwritten.

    Of the list sorted by (gap descending, id) only the head matters that holds `share` of the mass.
    A head is all tokens within some reach; one that holds enough gives the very numbers of the full
    list, since its running sums are the same. The total is rough until its error could change the
    outcome.
    """
    slack = 0.0
    if total is None:
        total, slack = rough_sum(x, peak, temperature, room)
    share = top_p if top_p < 1 else u
    shortcuts = (*_COMMON, (1 - share) / (2 * x.size)) if x.size > _SMALL else ()
    for least in (*shortcuts, 0.0):
        reach = temperature * math.log(least * total) if least else -math.inf
        # So probable are 1 / least tokens at most: where that is few, none need be counted.
        ids, gap = _within(x, peak, reach, are_few=least * x.size > 4)
        if ids is not None and _is_short(gap, temperature, share * (total - slack)):
            continue
        order = np.sort(gap)[::-1]
        mass = _weighed(order.copy(), temperature).cumsum(dtype=np.float64)
        place = _place(mass, total + slack, top_p, u, ids is None)
        if slack and place != _place(mass, total - slack, top_p, u, ids is None):
            total, slack = sum_of_weights(x, peak, temperature, room), 0.0
            place = _place(mass, total, top_p, u, ids is None)
        if place < mass.size:
            break
    # Only the gaps were sorted: the id follows from the gap and its rank among equals.
    rank = place - int(np.count_nonzero(gap > order[place]))
    found = int(np.flatnonzero(gap == order[place])[rank])
    return found if ids is None else int(ids[found])


def _is_short(gap: Logits, temperature: float, wanted: float) -> bool:
    """Whether so many tokens that to sort them would take a while have less than `wanted`."""
    if gap.size <= _SMALL:
        return False
    return bool(_weighed(gap.copy(), temperature).sum(dtype=np.float64) < wanted)


def _place(mass: NDArray[np.float64], total: float, top_p: float, u: float, is_whole: bool) -> int:
    """Where a draw falls in the running sums of a sorted list; beyond its end: it is too short.

    A nucleus ends where its share of `total` is reached; a draw exceeds its own.
    """
    is_nucleus = top_p < 1
    share, side = (top_p, _REACHED) if is_nucleus else (u, _EXCEEDED)
    place = int(mass.searchsorted(share * total, side))
    if place == mass.size:
        if not is_whole:
            return place
        place = int(mass.searchsorted(mass[-1]))  # rounding: the last that adds
    return min(place, int(mass.searchsorted(u * mass[place], _EXCEEDED))) if is_nucleus else place


def most_probable(x: Logits, peak: np.float32, n: int) -> list[int]:
    """The `n` tokens with the smallest gaps, by (gap descending, id)."""
    ids, gap = _within(x, peak, _reach_of(x, n) - float(peak))
    first = np.argsort(-gap, kind="stable")[:n]
    found: list[int] = (first if ids is None else ids[first]).tolist()
    return found


def sum_of_weights(x: Logits, peak: np.float32, temperature: float, room: Logits) -> float:
    """The sum of exp((x - peak) / temperature); `room`, as long as `x`, is overwritten."""
    weight = _weighed(np.subtract(x, peak, out=room), temperature)
    return float(weight.sum(dtype=np.float64))


def rough_sum(x: Logits, peak: np.float32, temperature: float, room: Logits) -> tuple[float, float]:
    """`sum_of_weights` in half the time, and how far it may be off.

    In units of 2**-24, for both sums together: each weight is off by 14 for its two powers, and by
    its exponent for each rounding of that; one sees the shift, five the gap. The mean gap, in units
    of temperature, is below the logarithm of the number of terms. _TERMS float32 terms >= 0 sum up
    to within _TERMS of their sum, in whatever order.
    """
    if x.size <= _SMALL:
        return sum_of_weights(x, peak, temperature, room), 0.0
    factor, shift = np.float32(1 / (temperature * math.log(_BASE))), 0.0
    if abs(peak) < _UNSHIFTED * temperature:  # one pass less
        np.multiply(x, factor, out=room)
        shift = float(peak) * float(factor)
    else:
        np.multiply(np.subtract(x, peak, out=room), factor, out=room)
    weight = _power(room, out=room)
    whole = weight.size // _TERMS * _TERMS
    columns = weight[:whole].reshape(_TERMS, -1).sum(axis=0)
    total = float(columns.sum(dtype=np.float64)) + float(weight[whole:].sum(dtype=np.float64))
    total *= _BASE**-shift
    units = _TERMS + 14 + abs(shift) + 5 * math.log(x.size)
    return total, total * units * 2.0**-24


def _weighed(gap: Logits, temperature: float) -> Logits:
    """exp(gap / temperature), in place."""
    if temperature != 1:
        np.divide(gap, np.float32(temperature), out=gap)
    return np.exp(gap, out=gap)


def _within(
    x: Logits, peak: np.float32, reach: float, are_few: bool = False
) -> tuple[NDArray[np.intp] | None, Logits]:
    """All tokens whose gap is at least `reach`, and their gaps; None: any, since most are."""
    # The logit that lies `reach` below the peak, and a little lower, as the sum is rounded.
    least = float(peak) + reach - 2.0**-20 * (abs(float(peak)) - reach)
    near = x >= least
    if reach == -math.inf or (not are_few and 2 * np.count_nonzero(near) > x.size):
        return None, x - peak
    ids = np.flatnonzero(near)
    gap = x[ids] - peak
    kept = gap >= reach
    return ids[kept], gap[kept]


def _reach_of(x: Logits, n: int) -> float:
    """A logit that at least `n` tokens reach (if there are as many), and few more."""
    if n >= x.size:
        return -math.inf
    if x.size >= 2 * _BLOCKS >= 2 * n:
        x = x[: x.size // _BLOCKS * _BLOCKS].reshape(-1, _BLOCKS).max(axis=0)
    return float(np.partition(x, -n)[-n])
