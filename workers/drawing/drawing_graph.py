"""The law of a draw (kernels.py) as nodes of a graph: tokens from rows of logits, or none.

Weights of the most probable tokens are the very whole numbers of the host, made by the same float32
operations, and their running sums are exact. Only the sum of all weights is rough, since the law
for each token of the vocabulary would cost many passes: it has a bound of its error, and a row
whose decision lies within that, or beyond the head of the list, is flagged. So a token given is
the host's, by proof and not by luck. Knows nothing of requests, penalties, masks or devices.

Long rows are not sorted: the list of the most probable tokens is made in two goes, the best of each
of SPLITS interleaved parts and the best of those. Whatever is above `cover` is in the list.
"""

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from workers.drawing.graph_nodes import Nodes

POWERS = (1.0, 0.6931472, 0.24022646, 0.055503286, 0.009618489, 0.0013399931, 0.00015345812)
ONE, DEEPEST = 2.0**44, 60.0

SPLITS, EACH, LIST = 128, 32, 2048
TIED = 512  # tokens of equal logits among which the one of some rank is found

# How far the rough total may be off, in units of 2**-24: the host's weights 6 (its polynomial) and
# 1 for each unit of gap / temperature; here float32 powers 4 (CUDA's expf: two units in the last
# place), 2 for each such unit. The mean of those is below the logarithm of the number of terms.
_UNIT, _FLAT, _SCALED = 2.0**-24, 16.0, 4.0
_ROUND32, _ROUND64 = 1.5 * 2.0**23, 1.5 * 2.0**52  # added and taken away: rounds, half to even

PARAMS = 6
"""Columns of a row's numbers: temperature, top_p, u, then `scales(temperature)`."""


def scales(temperature: float) -> tuple[float, float, float]:
    """What a gap is multiplied with to be a power of two, in two float32 parts, and the smallest
    gap that counts; float32 numbers."""
    factor = math.log2(math.e) / temperature
    high = float(np.float32(factor))
    return high, float(np.float32(factor - high)), float(np.float32(-DEEPEST / factor))


@dataclass(frozen=True, slots=True)
class Head:
    """The largest of a row: `values` float32 and `ids` int64, [B, length], descending.

    All tokens above `cover` [B, 1] are among them; those that equal it may be missing, and of those
    below it nothing is known. Equal values come in no order.
    """

    values: str
    ids: str
    length: int
    cover: str


def head_of(n: Nodes, x: str, width: int, length: int) -> Head:
    """The `length` largest of `x` float32 [B, width] without a NaN, or all."""
    if width < SPLITS * EACH * 2:
        found = min(width, length)
        values, ids = n.ops("TopK", 2, x, n.ints(found), axis=1)
        none_left = n.put([[-np.inf]], np.float32)
        return Head(values, ids, found, _last(n, values, found) if found < width else none_left)
    missing = -width % SPLITS
    if missing:
        x = n.op("Pad", x, n.ints(0, 0, 0, missing), n.f32(-np.inf))
    parts = n.op("Reshape", x, n.ints(-1, (width + missing) // SPLITS, SPLITS))
    parts = n.op("Transpose", parts, perm=[0, 2, 1])  # neighbours are alike: each goes elsewhere
    best, place = n.ops("TopK", 2, parts, n.ints(EACH), axis=2)
    ids = n.op("Mul", place, n.ints(SPLITS))
    ids = n.op("Add", ids, n.put(np.arange(SPLITS)[None, :, None], np.int64))
    flat = n.ints(-1, SPLITS * EACH)
    values, place = n.ops("TopK", 2, n.op("Reshape", best, flat), n.ints(length), axis=1)
    least = n.op("Slice", best, n.ints(EACH - 1), n.ints(EACH), n.ints(2))
    left_out = n.largest(n.op("Reshape", least, n.ints(-1, SPLITS)))
    cover = n.op("Max", left_out, _last(n, values, length))
    return Head(values, n.at(n.op("Reshape", ids, flat), place), length, cover)


def is_finite(n: Nodes, peak: str) -> str:
    """Of a largest value that is neither NaN nor +inf."""
    return n.op("Greater", peak, n.f32(-np.inf))


def rough_total(n: Nodes, x: str, peak: str, temperature: str | None) -> str:
    """The sum of exp((x - peak) / temperature), float64 [B, 1]; no temperature: 1."""
    gap = n.op("Sub", x, peak)
    scaled = gap if temperature is None else n.op("Div", gap, temperature)
    return n.sum(n.cast(n.op("Exp", scaled), TensorProto.DOUBLE))


def drawn(n: Nodes, x: str, width: int, head: Head, params: str) -> tuple[str, str]:
    """The token of each row [B, 1], and whether it is unknown.

    `params` float64 [B, PARAMS]. With a top_p of 0 it is the largest, the first of a tie.
    """
    temperature, top_p, u, *law = (n.columns(params, i, i + 1) for i in range(PARAMS))
    law = [n.cast(each, TensorProto.FLOAT) for each in law]
    peak = n.columns(head.values, 0, 1)
    lost = n.op("Not", is_finite(n, peak))
    peak = n.op("Where", lost, n.f32(0), peak)
    mass = n.op("CumSum", _weights(n, n.op("Sub", head.values, peak), law), n.put(1, np.int64))
    total = _total(n, rough_total(n, x, peak, n.cast(temperature, TensorProto.FLOAT)), width)
    hidden = _weights(n, n.op("Sub", head.cover, peak), law)
    kept = _nucleus(n, head, mass, total, hidden, top_p)
    reached = [n.count(n.op("LessOrEqual", mass, _target(n, u, bound))) for bound in kept]
    doubtful = n.op("Less", *reached)
    beyond = n.op("Equal", reached[0], n.ints(head.length))
    token, unknown = _token_at(n, head, reached[0])
    return token, n.either(lost, doubtful, beyond, unknown)


def _weights(n: Nodes, gap: str, law: list[str]) -> str:
    """The law's whole numbers, int64; `gap` float32 <= 0. One rounding an operation, none fused."""
    high, low, floor = law
    gap = n.op("Max", gap, floor)
    s = n.op("Mul", gap, high)
    whole = n.op("Sub", n.op("Add", s, n.f32(_ROUND32)), n.f32(_ROUND32))
    r = n.op("Add", n.op("Sub", s, whole), n.op("Mul", gap, low))
    p = n.f32(POWERS[-1])
    for coefficient in POWERS[-2::-1]:
        p = n.op("Add", n.op("Mul", p, r), n.f32(coefficient))
    table = ONE * np.exp2(np.arange(-DEEPEST, 1))
    index = n.cast(n.op("Add", whole, n.f32(DEEPEST)), TensorProto.INT64)
    scaled = n.op("Mul", p, n.op("Gather", n.put(table, np.float32), index, axis=0))
    exact = n.op("Add", n.cast(scaled, TensorProto.DOUBLE), n.f64(_ROUND64))
    return n.cast(n.op("Sub", exact, n.f64(_ROUND64)), TensorProto.INT64)


def _total(n: Nodes, rough: str, width: int) -> list[str]:
    """What the sum of all weights is at least and at most, int64."""
    off = (_FLAT + _SCALED * math.log(width)) * _UNIT
    bounds = [n.op("Mul", rough, n.f64(ONE * factor)) for factor in (1 - off, 1 + off)]
    return [n.cast(bound, TensorProto.INT64) for bound in bounds]


def _nucleus(
    n: Nodes, head: Head, mass: str, total: list[str], hidden: str, top_p: str
) -> list[str]:
    """The mass of the nucleus, at least and at most, int64.

    It is the first running sum that reaches its share of the total. Where none in the list does, it
    exceeds that share by less than one token of a weight that none outside the list exceeds:
    `hidden`, but for what a polynomial wobbles.
    """
    more = n.op("Add", _product(n, n.f64(1 + 2.0**-16), hidden, "Ceil"), n.ints(2))
    whole = n.op("GreaterOrEqual", top_p, n.f64(1))
    kept = []
    for bound, rest in zip(total, (n.ints(0), more), strict=True):
        needed = n.larger(_product(n, top_p, bound, "Ceil"), n.ints(1))
        end = n.count(n.op("Less", mass, needed))
        inside = n.smaller(end, n.ints(head.length - 1))
        outside = n.op("Less", n.at(head.values, inside), head.cover)
        outside = n.op("Or", n.op("Equal", end, n.ints(head.length)), outside)
        reached = n.op("Where", outside, n.op("Add", needed, rest), n.at(mass, inside))
        kept.append(n.op("Where", whole, bound, reached))
    return kept


def _target(n: Nodes, u: str, kept: str) -> str:
    """What the drawn token's running sum exceeds."""
    return n.smaller(_product(n, u, kept, "Floor"), n.op("Sub", kept, n.ints(1)))


def _product(n: Nodes, factor: str, count: str, rounding: str) -> str:
    product = n.op("Mul", factor, n.cast(count, TensorProto.DOUBLE))
    return n.cast(n.op(rounding, product), TensorProto.INT64)


def _token_at(n: Nodes, head: Head, place: str) -> tuple[str, str]:
    """The token at a place of the list sorted by (logit descending, id), and whether it is unknown:
    too many are tied with it, or some of those may be missing."""
    place = n.smaller(place, n.ints(head.length - 1))
    chosen = n.at(head.values, place)
    rank = n.op("Sub", place, n.count(n.op("Greater", head.values, chosen)))
    ids = n.op("Where", n.op("Equal", head.values, chosen), head.ids, n.ints(2**31))
    tied = min(TIED, head.length)
    first, _ = n.ops("TopK", 2, ids, n.ints(tied), axis=1, largest=0)
    many = n.op("GreaterOrEqual", rank, n.ints(tied))
    missing = n.op("Not", n.op("Greater", chosen, head.cover))
    return n.at(first, n.smaller(rank, n.ints(tied - 1))), n.op("Or", many, missing)


def _last(n: Nodes, values: str, length: int) -> str:
    return n.columns(values, length - 1, length)
