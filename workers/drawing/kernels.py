"""The sampler's arithmetic on rows of logits, compiled; numba is imported here alone.

Every weight is a whole number made by float32 operations on one logit, and every sum of weights is
a sum of integers. So no order of summation, no vector width and no shortcut can change a token:
what is drawn is what a stable sort of the whole row gives, whichever way it was found.

Knows nothing of requests: a row is logits, numbers (ROW), edits and a mask. Works in memory that
the caller keeps, without the interpreter's lock. All of it is one file: numba keeps what it has
compiled until the file of the outermost function changes.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

VERSION = 2
"""Of the law of a draw: raise it with any change that can change a token."""

DRAWN, NOT_FINITE, NONE_ALLOWED = 0, 1, 2
ONE = 2.0**44  # the largest weight
MOST_TOKENS = 2**19 - 1  # of a vocabulary: so many weights have a sum below 2**63
LOWEST_LOGPROB = -9999.0

ROW = np.dtype(
    [
        ("index", np.int64),  # of the row in the logits
        ("token", np.int64),  # to be scored; -1: one is to be sampled
        ("n_top", np.int64),  # of log-probabilities; -1: not even the token's
        ("temperature", np.float64),  # 0: greedy
        ("top_p", np.float64),
        ("u", np.float64),
        ("first_edit", np.int64),
        ("end_of_edits", np.int64),
        ("mask", np.int64),  # its place among the masks; -1: none
    ]
)
RESULT = np.dtype([("token", np.int64), ("problem", np.int64), ("logprob", np.float64)])

_BLOCK = 32  # logits whose largest is kept; a word of a mask
_CHUNK = 1024  # logits weighed at a time: what one loop leaves to the next stays near
_NEAR = (9, 13, 16, 18)  # tries to find the head: all tokens as probable as 2**-9, 2**-13, ...
_MOST = 0.7  # of the blocks: where more have a token of the head the whole row is taken
_FEW = 8  # a mask that allows less than one token in so many makes the row a shorter one
_SORTED = 48  # so many alike are sorted; more are thinned out first
_FINE = 64  # bins of a factor of two in weight
_DEEPEST = 60.0  # powers of two: a weight so far below the largest is 0

_EXPONENT = np.int32(127 + 44)
# 2**r for r in -0.5 to 0.5 to within 1.9e-9 (Remez), ascending powers, rounded to float32.
_C0, _C1, _C2, _C3 = map(np.float32, (1.0, 0.6931472, 0.24022646, 0.055503286))
_C4, _C5, _C6 = map(np.float32, (0.009618489, 0.0013399931, 0.00015345812))
_ROUND32 = np.float32(1.5 * 2**23)  # added and taken away: rounds to the nearest integer, half even
_ROUND64 = 1.5 * 2.0**52
_ROUND64_BITS = np.float64(_ROUND64).view(np.int64)

_SIGNLESS = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_LOWEST = np.uint32(0)  # the key of -inf
_HIGHEST = np.uint32(0xFF000000)  # the key of inf; a NaN has a larger one
_LAST, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_WORD = np.int64(0xFFFFFFFF)


class Memory(NamedTuple):
    """What one thread works in."""

    row: np.ndarray  # float32 [vocabulary]: adjusted logits
    blocks: np.ndarray  # uint32 [ceil(vocabulary / _BLOCK)]: the largest key of each
    values: np.ndarray  # float32 [vocabulary + 1]: some of a row's logits
    ids: np.ndarray  # int32 [vocabulary + 1]: and whose they are
    found: np.ndarray  # uint64 [vocabulary]: candidates, that sort by (logit descending, token)
    powers: np.ndarray  # float32 [_CHUNK]
    bins: np.ndarray  # int32 [_CHUNK]
    masses: np.ndarray  # int64: of each bin


def make_memory(vocabulary: int) -> Memory:
    return Memory(
        np.empty(vocabulary, np.float32),
        np.empty(-(-vocabulary // _BLOCK), np.uint32),
        np.empty(vocabulary + 1, np.float32),
        np.empty(vocabulary + 1, np.int32),
        np.empty(vocabulary, np.uint64),
        np.empty(_CHUNK, np.float32),
        np.empty(_CHUNK, np.int32),
        np.empty(int(_DEEPEST) * _FINE + 2, np.int64),
    )


# --- weights


@njit
def _law(peak, temperature):
    """How a row is weighed: its peak, the floor of gaps, log2(e) / temperature in two parts."""
    factor = math.log2(math.e) / temperature
    high = np.float32(factor)
    return peak, np.float32(-_DEEPEST / factor), high, np.float32(factor - np.float64(high))


@njit
def _gap(x, law):
    """How far a logit lies below the peak."""
    gap = x - law[0]
    return gap if gap > law[1] else law[1]


@njit
def _power(gap, law):
    """2**44 * exp(gap / temperature) in float32, not yet whole."""
    s = gap * law[2]
    shifted = s + _ROUND32
    r = (s - (shifted - _ROUND32)) + gap * law[3]
    p = (((((_C6 * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
    exponent = (np.float32(shifted).view(np.int32) + _EXPONENT) << np.int32(23)
    return p * np.int32(exponent).view(np.float32)


@njit
def _whole(power):
    """The nearest integer, half even."""
    return np.float64(np.float64(power) + _ROUND64).view(np.int64) - _ROUND64_BITS


@njit
def _total(x, law, memory):
    """The sum of all weights."""
    total = np.int64(0)
    for begin in range(0, x.size, _CHUNK):
        part = x[begin : begin + _CHUNK]
        powers = memory.powers[: part.size]
        for i in range(part.size):
            powers[i] = _power(_gap(part[i], law), law)
        for i in range(powers.size):
            total += _whole(powers[i])
    return total


# --- keys: integers that are ordered as logits are, -inf first, both zeros alike, NaN behind inf


@njit
def _key(x):
    bits = np.float32(x).view(np.int32)
    sign = bits >> np.int32(31)
    return np.uint32(((bits & _SIGNLESS) ^ sign) - sign + _INFINITY)


@njit
def _scan(x, blocks):
    """Each block's largest key; returns the row's."""
    whole = x.size // _BLOCK
    for b in range(whole):
        most = _LOWEST
        for i in range(b * _BLOCK, b * _BLOCK + _BLOCK):
            most = max(most, _key(x[i]))
        blocks[b] = most
    if whole < blocks.size:
        _scan_block(x, blocks, whole)
    return _largest(blocks)


@njit
def _largest(blocks):
    most = _LOWEST
    for key in blocks:
        most = max(most, key)
    return most


@njit
def _scan_block(x, blocks, b):
    most = _LOWEST
    for value in x[b * _BLOCK : (b + 1) * _BLOCK]:
        most = max(most, _key(value))
    blocks[b] = most


@njit
def _first(x, blocks, key):
    """The smallest token with this key, which is there."""
    b = 0
    while blocks[b] != key:
        b += 1
    i = b * _BLOCK
    while _key(x[i]) != key:
        i += 1
    return i


# --- the draw


@njit
def _full_at(total, top_p):
    """The mass with which a nucleus is full."""
    return max(np.int64(1), min(total, np.int64(math.ceil(top_p * np.float64(total)))))


@njit
def _drawn_at(mass, u):
    """The mass with which the draw is reached: more than a share `u` of what there is."""
    return min(np.int64(u * np.float64(mass)), mass - 1) + 1


@njit
def _draw(x, law, total, row, memory):
    """The token. All above some logit, that hold enough of the mass, do for the whole row."""
    wanted = _full_at(total, row["top_p"]) if row["top_p"] < 1 else _drawn_at(total, row["u"])
    for near in _NEAR:
        depth = np.float32(near - math.log2(np.float64(total) / ONE))
        n = _head(x, memory.blocks, law[0] - depth / law[2], memory)
        if n < 0:
            break
        values = memory.values[:n]
        if _total(values, law, memory) >= wanted:
            return np.int64(memory.ids[_pick(values, law, total, row, memory)])
    return _pick(x, law, total, row, memory)


@njit
def _head(x, blocks, least, memory):
    """How many logits are at least `least`; they, and whose they are. -1: in too many blocks."""
    key, touched = _key(least), 0
    for most in blocks:
        touched += most >= key
    if touched > blocks.size * _MOST:
        return -1
    values, ids, n = memory.values, memory.ids, 0
    for group in range(0, blocks.size, _BLOCK):
        those = _reaching(blocks[group : group + _BLOCK], key)
        while those:
            begin = (group + _lowest_bit(those)) * _BLOCK
            part = x[begin : begin + _BLOCK]
            hits = _reaching(part, least)
            while hits:
                i = _lowest_bit(hits)
                values[n], ids[n] = part[i], begin + i
                n += 1
                hits &= hits - 1
            those &= those - 1
    return n


@njit
def _reaching(part, least):
    """One bit for each that is at least so much."""
    bits = np.int64(0)
    for i in range(part.size):
        bits |= np.int64(part[i] >= least) << np.int64(i)
    return bits


@njit
def _lowest_bit(bits):
    """Its place, of at most 52: a float64's exponent."""
    return (np.float64(bits & -bits).view(np.int64) >> np.int64(52)) - np.int64(1023)


@njit
def _pick(values, law, total, row, memory):
    """Inverse CDF over the values in order of probability (steps 9 and 10): the place of one.

    Of the whole row's mass, `total`, the values have what they need.
    """
    _weigh_bins(values, law, memory)
    if row["top_p"] < 1:
        _, total = _find(values, law, _full_at(total, row["top_p"]), memory)
    return _find(values, law, _drawn_at(total, row["u"]), memory)[0]


@njit
def _bin(gap, law):
    """Bins are ordered as logits are: 0 for the most probable, each 1 / _FINE of an octave."""
    return np.int32(gap * law[2] * np.float32(-_FINE))


@njit
def _weigh_bins(values, law, memory):
    masses = memory.masses
    for bin in range(masses.size):
        masses[bin] = 0
    for begin in range(0, values.size, _CHUNK):
        part = values[begin : begin + _CHUNK]
        powers, bins = memory.powers[: part.size], memory.bins[: part.size]
        for i in range(part.size):
            gap = _gap(part[i], law)
            powers[i] = _power(gap, law)
            bins[i] = _bin(gap, law)
        for i in range(part.size):
            masses[bins[i]] += _whole(powers[i])


@njit
def _find(values, law, wanted, memory):
    """(place, mass so far) of the value with which the mass, in order, is at least `wanted`."""
    bin, above = 0, np.int64(0)
    while above + memory.masses[bin] < wanted:
        above += memory.masses[bin]
        bin += 1
    n = _members(values, law, bin, memory.found)
    n, above = _thin(memory.found, n, values, law, above, wanted)
    found = memory.found[:n]
    if n > _SORTED:  # all alike, in order
        weight = _weight_of(found[0], values, law)
        rank = (wanted - above - 1) // weight
        return np.int64(found[rank] & _LAST), above + (rank + 1) * weight
    _sort(found)
    place = 0
    for candidate in found:
        place = np.int64(candidate & _LAST)
        above += _weight_of(candidate, values, law)
        if above >= wanted:
            break
    return place, above


@njit
def _weight_of(candidate, values, law):
    return _whole(_power(_gap(values[np.int64(candidate & _LAST)], law), law))


@njit
def _members(values, law, bin, found):
    """How many values a bin has, and which."""
    n = 0
    for begin in range(0, values.size, _BLOCK):
        part = values[begin : begin + _BLOCK]
        hits = np.int64(0)
        for i in range(part.size):
            hits |= np.int64(_bin(_gap(part[i], law), law) == bin) << np.int64(i)
        while hits:
            i = _lowest_bit(hits)
            key = _LAST - np.uint64(_key(part[i]))
            found[n] = key << _HALF | np.uint64(begin + i)
            n += 1
            hits &= hits - 1
    return n


@njit
def _sort(found):
    for end in range(1, found.size):
        moved, i = found[end], end
        while i > 0 and found[i - 1] > moved:
            found[i] = found[i - 1]
            i -= 1
        found[i] = moved


@njit
def _thin(found, n, values, law, above, wanted):
    """(number, mass above them) of candidates few enough to sort, or all alike and so in order."""
    while n > _SORTED:
        pivot = found[n // 2] >> _HALF
        before, like, likes = np.int64(0), found[n // 2], 0
        for candidate in found[:n]:
            if candidate >> _HALF < pivot:
                before += _weight_of(candidate, values, law)
            likes += candidate >> _HALF == pivot
        if likes == n:
            break
        mass = likes * _weight_of(like, values, law)
        low, high = np.uint64(0), _LAST
        if above + before >= wanted:
            high = pivot - np.uint64(1)
        elif above + before + mass >= wanted:
            low, high, above = pivot, pivot, above + before
        else:
            low, above = pivot + np.uint64(1), above + before + mass
        kept = 0
        for i in range(n):
            if low <= found[i] >> _HALF and found[i] >> _HALF <= high:
                found[kept] = found[i]
                kept += 1
        n = kept
    return n, above


# --- one row


@njit
def _top(x, blocks, ids):
    """The most probable tokens into `ids`, by (logit descending, token)."""
    n, least = 0, _LOWEST
    for b in range(blocks.size):
        if n == ids.size and blocks[b] <= least:
            continue
        for i in range(b * _BLOCK, min(x.size, (b + 1) * _BLOCK)):
            key = _key(x[i])
            if n == ids.size and key <= least:
                continue
            place = min(n, ids.size - 1)
            while place > 0 and _key(x[ids[place - 1]]) < key:
                ids[place] = ids[place - 1]
                place -= 1
            ids[place] = i
            n = min(n + 1, ids.size)
            least = _key(x[ids[n - 1]])


@njit
def _logprob(x, peak, log_total):
    return max(np.float64(x) - np.float64(peak) - log_total, LOWEST_LOGPROB)


@njit
def _edit(x, blocks, ids, amounts, law):
    """Penalties and bias (section 2.1, steps 3 and 4); returns by how much the mass has grown."""
    grown = np.int64(0)
    for i in range(ids.size):
        token, b = ids[i], ids[i] // _BLOCK
        before = x[token]
        after = np.float32(np.float64(before) + amounts[i])
        x[token] = after
        grown += _whole(_power(_gap(after, law), law)) - _whole(_power(_gap(before, law), law))
        if _key(after) >= blocks[b]:
            blocks[b] = _key(after)
        elif _key(before) == blocks[b]:
            _scan_block(x, blocks, b)
    return grown


@njit
def _forbid(x, mask, blocks):
    """All that the mask does not allow := -inf (step 5)."""
    for b in range(blocks.size):
        word = mask[b]
        if word != np.int32(-1):
            part = x[b * _BLOCK : (b + 1) * _BLOCK]
            for i in range(part.size):
                is_allowed = (word >> np.int32(i)) & np.int32(1)
                part[i] = part[i] if is_allowed else np.float32(-np.inf)
            _scan_block(x, blocks, b)


@njit
def _allowed(x, mask, memory):
    """How many tokens the mask allows, their logits and ids; -1: not few."""
    values, ids, n = memory.values, memory.ids, 0
    most = x.size // _FEW
    for b in range(memory.blocks.size):
        bits = np.int64(mask[b]) & _WORD
        if bits and n + _BLOCK > most:
            return -1
        while bits:
            i = b * _BLOCK + _lowest_bit(bits)
            bits &= bits - 1
            if i < x.size:
                values[n], ids[n] = x[i], i
                n += 1
    return n


@njit
def _sample_few(values, row, memory):
    """The place of one of these, or -1: all are -inf."""
    place = 0
    for i in range(1, values.size):
        if values[i] > values[place]:
            place = i
    if values.size == 0 or values[place] == -np.inf:
        return -1
    if row["temperature"] == 0:
        return place
    law = _law(values[place], row["temperature"])
    return _pick(values, law, _total(values, law, memory), row, memory)


@njit
def _sample_many(x, row, total, memory):
    """The token, or -1: none has a logit. `total`: where it is known, or 0."""
    key = _largest(memory.blocks)
    if key == _LOWEST:
        return -1
    token = _first(x, memory.blocks, key)
    if row["temperature"] == 0:
        return token
    law = _law(x[token], row["temperature"])
    if total == 0:
        total = _total(x, law, memory)
    return _draw(x, law, total, row, memory)


@njit
def _sample(raw, peak, row, ids, amounts, mask, total, memory):
    """The token, or -1. `total` is the mass of the row as it came at temperature 1, or 0."""
    x = raw
    if ids.size or mask.size:
        x = memory.row
        for i in range(x.size):  # an assignment of slices would compile its error's message
            x[i] = raw[i]
        grown = _edit(x, memory.blocks, ids, amounts, _law(peak, 1.0))
        is_known = total > 0 and _largest(memory.blocks) == _key(peak)
        total = total + grown if is_known else np.int64(0)
    if mask.size:
        n = _allowed(x, mask, memory)
        if n >= 0:
            place = _sample_few(memory.values[:n], row, memory)
            return place if place < 0 else memory.ids[place]
        _forbid(x, mask, memory.blocks)
        total = 0
    return _sample_many(x, row, total if row["temperature"] == 1 else 0, memory)


@njit
def _sample_row(raw, row, ids, amounts, mask, result, top, logprobs, memory):
    key = _scan(raw, memory.blocks)
    if key == _LOWEST or key >= _HIGHEST:
        result["problem"] = NOT_FINITE
        result["logprob"] = -np.inf if key == _LOWEST else (np.inf if key == _HIGHEST else np.nan)
        return
    peak, own = raw[_first(raw, memory.blocks, key)], np.int64(0)
    if row["n_top"] >= 0:
        own = _total(raw, _law(peak, 1.0), memory)
        if top.size:
            _top(raw, memory.blocks, top)
    token = row["token"]
    if token < 0:
        token = _sample(raw, peak, row, ids, amounts, mask, own, memory)
    if token < 0:
        result["problem"] = NONE_ALLOWED
        return
    result["token"] = token
    if own > 0:
        log_total = math.log(np.float64(own) / ONE)
        result["logprob"] = _logprob(raw[token], peak, log_total)
        for i in range(top.size):
            logprobs[i] = _logprob(raw[top[i]], peak, log_total)


def _kept(function):
    """Compiled once a machine, if there is a place to keep what was compiled."""
    try:
        return njit(function, nogil=True, cache=True)
    except RuntimeError:  # neither beside this file nor in the user's cache
        return njit(function, nogil=True)


@_kept
def sample_rows(logits, rows, ids, amounts, masks, results, top, logprobs, memory):
    """Sample or score each of `rows` (ROW) into `results` (RESULT), `top` and `logprobs`.

    `logits` is float32 [n, >= vocabulary], `ids` and `amounts` what is added to which logits, one
    row's after the other's, `masks` int32 [m, ceil(vocabulary / 32)], `top` and `logprobs` int64
    and float64 [len(rows), >= the most that is asked for]. Returns the VERSION it was compiled in.
    """
    vocabulary = memory.row.size
    for k in range(rows.size):
        row = rows[k]
        n_top = max(row["n_top"], 0)
        begin, end = row["first_edit"], row["end_of_edits"]
        _sample_row(
            logits[row["index"], :vocabulary],
            row,
            ids[begin:end],
            amounts[begin:end],
            masks[row["mask"]] if row["mask"] >= 0 else masks[0, :0],
            results[k],
            top[k, :n_top],
            logprobs[k, :n_top],
            memory,
        )
    return VERSION


def compiled_version() -> int:
    """Compiles (seconds), or loads what was compiled before (a fraction of one)."""
    no_rows = (np.empty(0, ROW), np.empty(0, np.int64), np.empty(0, np.float64))
    no_results = (np.empty(0, RESULT), np.empty((0, 0), np.int64), np.empty((0, 0), np.float64))
    no_logits, no_masks = np.empty((0, 0), np.float32), np.empty((1, 0), np.int32)
    version: int = sample_rows(no_logits, *no_rows, no_masks, *no_results, make_memory(0))
    return version


def warm_up() -> None:
    """Be ready: the first row waits for nothing."""
    try:
        _compile()
    except OSError:  # compiled, but not kept: the disk is full, perhaps
        _compile()


def _compile() -> None:
    if compiled_version() != VERSION:  # kept from another file of the same age and size
        sample_rows.recompile()
