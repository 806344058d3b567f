"""The sampler as an ONNX graph, for logits that lie on a device: what a step has to fetch is small.

Rows in; for each a token, or NONE where the host has to look itself (drawing_graph.py says when),
and what log-probabilities are made of. Knows operators; nothing of sessions, devices, requests or
random numbers.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from onnx import TensorProto, helper

from workers.drawing.drawing_graph import LIST, PARAMS, Head, drawn, head_of, is_finite, rough_total
from workers.drawing.graph_nodes import Nodes

NONE = -1  # in place of a token
TOP = 64  # tokens reported; more than anybody may ask for, as it is the host that breaks ties
FACTS = 5  # columns of the output before those: token, total, peak, at, cover


@dataclass(frozen=True, slots=True)
class Variant:
    """What a batch needs: graphs are small, so each kind of batch has its own.

    `kind` is the logits' TensorProto type, `width` their columns, of which those from `vocab` on
    are padding. `drawn` draws (and is right for greedy rows among others), `greedy` takes the
    largest, `given` takes the input `wanted`. Inputs, for B rows:

    | name | shape, type | where |
    |---|---|---|
    | logits | [B, width] kind | always |
    | params | [B, PARAMS] float64; of a greedy row top_p 0, u 0, any temperature | drawn |
    | wanted | [B, 1] int64 | given |
    | ids, edits | [B, K] int64, [B, K, 2] float64: penalty to subtract, bias to add | adjusted |
    | mask | [B, mask_bytes] uint8: a bit a token, least significant first | masked |

    A row of `ids` may name a token again if its edits are the same: that is how rows are padded.
    Output `out`, float64 [B, 1]: the token or NONE; with `logprobs` [B, FACTS + 2 * TOP]: token,
    the sum of exp(x - peak) over the model's own logits x, their peak, the token's x, the cover (an
    x above which all tokens are among those that follow); x of the TOP most probable; their ids
    (NONE: there are no more).
    """

    kind: int
    width: int
    vocab: int
    choose: Literal["greedy", "drawn", "given"]
    adjusted: bool = False
    masked: bool = False
    logprobs: bool = False


def mask_bytes(vocab: int) -> int:
    """Bytes of a row of masks: whole words of 32 tokens."""
    return -(-vocab // 32) * 4


def build(variant: Variant) -> bytes:
    """The graph of `variant`, serialized."""
    n = Nodes()
    raw, x, unsound = _source(n, variant)
    head: Head | None = None
    if variant.choose == "drawn":
        head = head_of(n, x, variant.width, LIST)
        found, unknown = drawn(n, x, variant.width, head, "params")
    else:
        found, unknown = _largest(n, variant, x)
    chosen = n.op("Where", n.op("Or", unsound, unknown), n.ints(NONE), found)
    out = n.cast(chosen, TensorProto.DOUBLE)
    columns = 1
    if variant.logprobs:
        own = head if head is not None and raw == x else head_of(n, raw, variant.width, TOP)
        out = n.op("Concat", out, *_facts(n, raw, chosen, own), axis=1)
        columns = FACTS + 2 * TOP
    info = helper.make_tensor_value_info("out", TensorProto.DOUBLE, ["rows", columns])
    return n.model("sampler", _inputs(variant), {out: info})


def _inputs(variant: Variant) -> list[Any]:
    def info(name: str, kind: int, *columns: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, ["rows", *columns])

    inputs = [info("logits", variant.kind, variant.width)]
    if variant.choose == "drawn":
        inputs.append(info("params", TensorProto.DOUBLE, PARAMS))
    if variant.choose == "given":
        inputs.append(info("wanted", TensorProto.INT64, 1))
    if variant.adjusted:
        inputs.append(info("ids", TensorProto.INT64, "edited"))
        inputs.append(info("edits", TensorProto.DOUBLE, "edited", 2))
    if variant.masked:
        inputs.append(info("mask", TensorProto.UINT8, mask_bytes(variant.vocab)))
    return inputs


def _source(n: Nodes, variant: Variant) -> tuple[str, str, str]:
    """The model's own logits and the adjusted ones, float32 without a NaN, and whether a row had a
    NaN or an infinite largest logit: the host has words for that."""
    x = "logits" if variant.kind == TensorProto.FLOAT else n.cast("logits", TensorProto.FLOAT)
    nothing = n.f32(-np.inf)
    if variant.vocab < variant.width:
        known = n.put([np.arange(variant.width) < variant.vocab], np.bool_)
        x = n.op("Where", known, x, nothing)
    sound = n.op("Less", x, n.f32(np.inf))  # not so of a NaN
    unsound = n.largest(n.op("Where", sound, n.f32(0), n.f32(1)))
    raw = n.op("Where", sound, x, nothing)
    adjusted = _edited(n, raw) if variant.adjusted else raw
    if variant.masked:
        adjusted = n.op("Where", _unpacked(n, variant), adjusted, nothing)
    return raw, adjusted, n.op("Greater", unsound, n.f32(0.5))


def _edited(n: Nodes, x: str) -> str:
    """Penalties, then bias, each added in float64 and rounded, as the host does."""
    edits = [n.op("Slice", "edits", n.ints(i), n.ints(i + 1), n.ints(2)) for i in (0, 1)]
    penalty, bias = (n.op("Squeeze", edit, n.ints(2)) for edit in edits)
    value = n.cast(n.at(x, "ids"), TensorProto.DOUBLE)
    value = n.cast(n.op("Sub", value, penalty), TensorProto.FLOAT)
    value = n.op("Add", n.cast(value, TensorProto.DOUBLE), bias)
    return n.op("ScatterElements", x, "ids", n.cast(value, TensorProto.FLOAT), axis=1)


def _unpacked(n: Nodes, variant: Variant) -> str:
    """The mask's bits as bool [B, width]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    spread = n.op("Gather", n.put(bits, np.bool_), n.cast("mask", TensorProto.INT32), axis=0)
    found = 8 * mask_bytes(variant.vocab)
    mask = n.op("Reshape", spread, n.ints(-1, found))
    if found < variant.width:
        return n.op("Pad", mask, n.ints(0, 0, 0, variant.width - found))
    return n.columns(mask, 0, variant.width) if found > variant.width else mask


def _largest(n: Nodes, variant: Variant, x: str) -> tuple[str, str]:
    """The largest of each row, the first of a tie, or the token asked for; and whether there is
    no largest."""
    peak = n.largest(x)
    none = n.op("Not", is_finite(n, peak))
    if variant.choose == "given":
        return "wanted", none
    every = n.put([np.arange(variant.width)], np.int32)
    first = n.op("Where", n.op("Equal", x, peak), every, n.put(variant.width, np.int32))
    first = n.op("ReduceMin", first, n.ints(1), keepdims=1)
    return n.cast(first, TensorProto.INT64), none


def _facts(n: Nodes, raw: str, chosen: str, head: Head) -> list[str]:
    """The output's columns after the token."""
    peak = n.columns(head.values, 0, 1)
    at = n.at(raw, n.larger(chosen, n.ints(0)))
    found = min(TOP, head.length)
    values = n.columns(head.values, 0, found)
    ids = n.cast(n.columns(head.ids, 0, found), TensorProto.DOUBLE)
    cover = head.cover
    if found < head.length:
        cover = n.op("Max", cover, n.columns(values, found - 1, found))
    if found < TOP:
        missing = n.ints(0, 0, 0, TOP - found)
        values = n.op("Pad", values, missing, n.f32(-np.inf))
        ids = n.op("Pad", ids, missing, n.f64(NONE))
    parts = [n.cast(part, TensorProto.DOUBLE) for part in (peak, at, cover, values)]
    return [rough_total(n, raw, peak, None), *parts, ids]
