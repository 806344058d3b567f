"""The sampler's graph gives the law's token or none, and none is rare where a row is peaked.

The graphs run here on the processor; on a GPU the same file is what to run first. Random numbers
are put right beside the borders between tokens, where millions of draws would hardly come.
"""

import math
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from tests import whole_law
from tests.host_room import open_session
from workers.drawing import drawing_graph, kernels
from workers.drawing.drawing_graph import scales
from workers.drawing.sampler_graph import NONE, Variant, build, mask_bytes

SEED = 20260901
Rows = NDArray[np.float32]
# Of operator set 18 or before; only types that the sampler could want.
NUMBERS = "FLOAT DOUBLE INT32 INT64"
KERNELS = {
    "Add": NUMBERS,
    "And": "BOOL",
    "Cast": f"{NUMBERS} BFLOAT16 FLOAT16 BOOL UINT8",
    "Ceil": "FLOAT DOUBLE",
    "Concat": f"{NUMBERS} BOOL UINT8",
    "CumSum": NUMBERS,
    "Div": NUMBERS,
    "Equal": f"{NUMBERS} BOOL",
    "Exp": "FLOAT DOUBLE",
    "Floor": "FLOAT DOUBLE",
    "Gather": f"{NUMBERS} BOOL UINT8",
    "GatherElements": f"{NUMBERS} BOOL UINT8",
    "Greater": NUMBERS,
    "GreaterOrEqual": NUMBERS,
    "Identity": f"{NUMBERS} BOOL UINT8",
    "Less": NUMBERS,
    "LessOrEqual": NUMBERS,
    "Max": "FLOAT",  # int64 on the processor is wrong, and here it is tested
    "Mul": NUMBERS,
    "Not": "BOOL",
    "Or": "BOOL",
    "Pad": "BOOL FLOAT DOUBLE",
    "ReduceMax": NUMBERS,
    "ReduceMin": NUMBERS,
    "ReduceSum": NUMBERS,
    "Reshape": f"{NUMBERS} BOOL UINT8",
    "ScatterElements": f"{NUMBERS} BOOL UINT8",
    "Slice": f"{NUMBERS} BOOL UINT8",
    "Squeeze": f"{NUMBERS} BOOL UINT8",
    "Sub": NUMBERS,
    "TopK": NUMBERS,
    "Transpose": NUMBERS,
    "Where": "FLOAT INT32 INT64 UINT8",
}


@cache
def session(variant: Variant) -> Any:
    return open_session(build(variant))


def run(variant: Variant, **inputs: NDArray[Any]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = session(variant).run(None, inputs)[0]
    return out


def peaked(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """About as much as a trained model's: 3 nats of entropy."""
    return (rng.standard_normal(shape) * math.sqrt(2 * (math.log(shape[1]) - 3))).astype(np.float32)


def flat(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    return (rng.standard_normal(shape) * 0.3).astype(np.float32)


def tied(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """As logits in half precision are: many are equal."""
    return np.round(peaked(rng, shape) * 8) / np.float32(8)


def equal(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    return np.full(shape, rng.standard_normal(), np.float32)


def one(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """A single token has all of the mass; some are -inf."""
    x = flat(rng, shape)
    x[:, 1::3] = -np.inf
    x[np.arange(shape[0]), rng.integers(0, shape[1] // 3, shape[0]) * 3] += 60
    return x


def crowded(rng: np.random.Generator, shape: tuple[int, int]) -> Rows:
    """The most probable tokens come 128 apart, all in one part of a long row."""
    x = peaked(rng, shape)
    x[:, 3::128] += 8
    return x


SHAPES = [peaked, flat, tied, equal, one, crowded]


def beside_the_borders(
    x: Rows, temperature: float, top_p: float, rng: np.random.Generator
) -> float:
    """A number whose target is at a border of the law, or a little off."""
    _, sums = whole_law.mass(x, temperature)
    whole = whole_law.kept(sums, top_p)
    inside = [c for c in sums if c < whole] or [0]
    border = inside[int(rng.integers(len(inside)))]
    off = int(rng.integers(-3, 4)) * 2 ** int(rng.integers(0, 30))
    return min(max((border + off) / whole, 0.0), 1 - 2.0**-53)


# The list is the whole row; a part of it; the best of parts, with columns filled up and padding.
@pytest.mark.parametrize(("vocab", "width"), [(300, 300), (3000, 3000), (9000, 9001)])
@pytest.mark.parametrize("make", SHAPES)
def test_a_token_that_is_given_is_the_laws(make: Any, vocab: int, width: int) -> None:
    rng = np.random.default_rng(SEED)
    variant = Variant(TensorProto.FLOAT, width, vocab, "drawn")
    given = 0
    for temperature, top_p in ((1.0, 1.0), (1.0, 0.95), (0.7, 0.5), (2.0, 0.9), (0.01, 1.0)):
        x = make(rng, (48, width))
        if width > vocab:
            x[:, vocab:] = [[np.nan if i % 2 else 99.0] for i in range(len(x))]
        us = [beside_the_borders(row[:vocab], temperature, top_p, rng) for row in x[:32]]
        us += rng.random(16).tolist()
        params = np.array([(temperature, top_p, u, *scales(temperature)) for u in us])
        tokens = run(variant, logits=x, params=params)[:, 0]
        for row, u, token in zip(x, us, tokens, strict=True):
            if token != NONE:
                given += 1
                assert token == whole_law.drawn(row[:vocab], temperature, top_p, u), (
                    f"seed {SEED}, {temperature=}, {top_p=}, {u=}"
                )
    if vocab == 300 and make in (peaked, tied, one):  # half of these are meant to be in doubt
        assert given > 100, given


@pytest.mark.parametrize("vocab", [300, 9000, 32000])
def test_few_rows_of_a_trained_model_are_left_to_the_host(vocab: int) -> None:
    rng = np.random.default_rng(SEED)
    variant = Variant(TensorProto.FLOAT, vocab, vocab, "drawn")
    for make in (peaked, tied):
        x = make(rng, (64, vocab))
        params = np.array([(1.0, 0.95, u, *scales(1.0)) for u in rng.random(64)])
        none = int((run(variant, logits=x, params=params)[:, 0] == NONE).sum())
        assert none <= 6, f"{none} of 64 rows, vocabulary {vocab}, {make.__name__}"


@pytest.mark.parametrize("choose", ["greedy", "drawn"])
@pytest.mark.parametrize("width", [300, 9000])
def test_greedy_rows_take_the_first_of_a_tie(choose: Any, width: int) -> None:
    rng = np.random.default_rng(SEED)
    variant = Variant(TensorProto.FLOAT, width, width, choose)
    x = np.concatenate([make(rng, (8, width)) for make in (peaked, flat, tied, one)])
    x[0, [7, 9, 290]] = 50.0
    x[1, :] = [-0.0, 0.0] * (width // 2)
    params = {"params": np.tile((1.0, 0.0, 0.0, *scales(1.0)), (len(x), 1))}
    tokens = run(variant, logits=x, **(params if choose == "drawn" else {}))[:, 0]
    assert tokens[0] == 7
    for row, token in zip(x, tokens, strict=True):
        assert token in (row.argmax(), NONE if choose == "drawn" else row.argmax())


@pytest.mark.parametrize("choose", ["greedy", "drawn", "given"])
def test_rows_that_are_no_distribution_are_left_to_the_host(choose: Any) -> None:
    width = 300
    x = np.zeros((6, width), np.float32)
    x[0, 5] = np.nan
    x[1, :] = np.nan
    x[2, 299] = np.inf
    x[3, :] = -np.inf
    x[4, :] = [-np.inf] * 299 + [3.0]
    x[5, 4] = -np.inf
    inputs = {
        "greedy": {},
        "drawn": {"params": np.tile((1.0, 1.0, 0.3, *scales(1.0)), (6, 1))},
        "given": {"wanted": np.full((6, 1), 8, np.int64)},
    }[choose]
    variant = Variant(TensorProto.FLOAT, width, width, choose, logprobs=True)
    tokens = run(variant, logits=x, **inputs)[:, 0]
    assert (tokens[:4] == NONE).all() and (tokens[4:] != NONE).all()
    assert tokens[4] == (8 if choose == "given" else 299)


def test_what_a_mask_forbids_is_not_drawn_and_an_empty_one_is_the_hosts() -> None:
    rng = np.random.default_rng(SEED)
    for vocab, width in ((300, 300), (290, 350), (9000, 9000)):
        variant = Variant(TensorProto.FLOAT, width, vocab, "drawn", masked=True)
        x = peaked(rng, (32, width))
        bits = np.zeros((32, 8 * mask_bytes(vocab)), np.uint8)
        bits[:, :vocab] = rng.random((32, vocab)) < 0.05
        bits[0] = 0
        params = np.array([(1.0, 0.9, u, *scales(1.0)) for u in rng.random(32)])
        mask = np.packbits(bits, axis=1, bitorder="little")
        tokens = run(variant, logits=x, params=params, mask=mask)[:, 0].astype(int)
        assert tokens[0] == NONE
        allowed = np.where(bits[:, :vocab] == 1, x[:, :vocab], np.float32(-np.inf))
        for row, (_, top_p, u, *_), token in zip(allowed[1:], params[1:], tokens[1:], strict=True):
            assert token in (whole_law.drawn(row, 1.0, top_p, u), NONE), f"seed {SEED}"
        assert (tokens != NONE).sum() > 24


def test_edits_are_rounded_as_on_the_host() -> None:
    """Greedy rows show it: a bias that makes two logits equal, or just not."""
    rng = np.random.default_rng(SEED)
    width, rows = 300, 64
    variant = Variant(TensorProto.FLOAT, width, width, "greedy", adjusted=True)
    x = peaked(rng, (rows, width))
    ids = np.argsort(-x, axis=1)[:, :4].astype(np.int64)
    ids[:, 3] = ids[:, 0]  # filled up with what is there
    edits = np.zeros((rows, 4, 2))
    expected = x.copy()
    for row in range(rows):
        best = x[row, ids[row, 0]]
        for k in (1, 2):
            penalty = float(rng.standard_normal())
            reduced = np.float32(float(x[row, ids[row, k]]) - penalty)
            edits[row, k] = (
                penalty,
                float(best) - float(reduced) + float(rng.integers(-1, 2)) * 1e-8,
            )
            expected[row, ids[row, k]] = np.float32(float(reduced) + edits[row, k, 1])
    tokens = run(variant, logits=x, ids=ids, edits=edits)[:, 0]
    assert (tokens == expected.argmax(axis=1)).all()
    assert len(set((tokens == x.argmax(axis=1)).tolist())) == 2  # some of them moved


def test_every_operator_has_a_kernel_on_cuda() -> None:
    """In the types it is used with, by onnxruntime's list of its kernels (docs/OperatorKernels.md):
    one that had none would bring whole rows back to the processor, without a word."""
    for choose in ("greedy", "drawn", "given"):
        for adjusted, masked, logprobs in product((False, True), repeat=3):
            for vocab, width in ((60, 60), (3000, 3000), (9000, 9001)):
                kind = TensorProto.BFLOAT16
                variant = Variant(kind, width, vocab, choose, adjusted, masked, logprobs)
                model = onnx.load_from_string(build(variant))
                graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
                values = (*graph.value_info, *graph.input, *graph.output)
                types = {value.name: value.type.tensor_type.elem_type for value in values}
                types |= {each.name: each.data_type for each in graph.initializer}
                for node in graph.node:
                    first = node.input[1 if node.op_type == "Where" else 0]
                    name = TensorProto.DataType.Name(types[first])
                    assert name in KERNELS[node.op_type].split(), (node.op_type, name)


def test_the_law_is_the_hosts() -> None:
    names = [f"_C{i}" for i in range(len(drawing_graph.POWERS))]
    assert [getattr(kernels, name) for name in names] == [
        np.float32(c) for c in drawing_graph.POWERS
    ]
    assert (kernels.ONE, kernels._DEEPEST) == (drawing_graph.ONE, drawing_graph.DEEPEST)


def test_the_bound_of_the_total_holds_and_is_needed() -> None:
    """The rough total against the law's, over rows of every shape and temperature."""
    rng = np.random.default_rng(SEED)
    worst = 0.0
    for make in SHAPES:
        for temperature in (0.01, 0.3, 1.0, 2.0):
            for row in make(rng, (4, 5000)):
                exact = float(whole_law.weights(row, temperature).sum())
                gap = (row - row.max()) / np.float32(temperature)
                rough = float(np.exp(gap).astype(np.float64).sum()) * drawing_graph.ONE
                worst = max(worst, abs(rough / exact - 1) / drawing_graph._UNIT)
    units = drawing_graph._FLAT + drawing_graph._SCALED * math.log(5000)
    assert worst < units / 3, f"{worst:.1f} of {units:.1f} units"
    assert worst > 0.1
