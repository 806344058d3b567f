"""A Llama of real size with random weights, as the onnxruntime-genai builder lays it out.

For a machine with a GPU and nothing else: no torch, no builder, no checkpoint. All layers share one
layer's weights in the file, which is so a fourteenth of the model's size; in the device's memory
each layer has its own. Knows nothing of Penstock, nor of how fast anything runs.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SEED = 20260904
KINDS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
INITIALIZER = 0.02
LOGIT_STD = 4.2  # of a row of logits: about 3 nats of entropy, a trained model's
OPSET, MICROSOFT = 21, "com.microsoft"
DATA, GRAPH, SHAPE = "model.onnx.data", "model.onnx", "shape.json"


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model's sizes."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rope_theta: float
    context: int


SHAPES = {
    "llama-3.1-8b": Shape(128_256, 4_096, 14_336, 32, 32, 8, 128, 500_000.0, 8_192),
    # To try the script itself; far too small to measure anything with.
    "smoke": Shape(2_048, 64, 128, 2, 4, 2, 16, 10_000.0, 256),
}


def make(folder: Path, shape: Shape, precision: str) -> None:
    """Write the folder, unless it is there."""
    wanted = {**asdict(shape), "precision": precision}
    record = folder / SHAPE
    if record.is_file() and json.loads(record.read_text()) == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / DATA).open("wb") as stream:
        weights = _Weights(stream, precision)
        graph = _graph(shape, precision, weights)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
    )
    (folder / GRAPH).write_bytes(model.SerializeToString())
    (folder / "genai_config.json").write_text(json.dumps(_config(shape), indent=1))
    _tokenizer(shape.vocab).save(str(folder / "tokenizer.json"))
    record.write_text(json.dumps(wanted, indent=1))


class _Weights:
    """Tensors in one file beside the graph; each is written once, whoever uses it."""

    def __init__(self, stream: BinaryIO, precision: str) -> None:
        self.stream, self.precision = stream, precision
        self.random = np.random.default_rng(SEED)
        self.places: dict[str, tuple[int, int]] = {}
        self.tensors: list[Any] = []

    def normal(self, name: str, shape: tuple[int, ...], std: float, shared: str = "") -> str:
        """`shared`: the name under which others have the same numbers."""
        key = shared or name
        if key not in self.places:
            begin = self.stream.tell()
            for rows in self._normal(shape, std):
                self.stream.write(rows)
            self.places[key] = begin, self.stream.tell() - begin
        offset, length = self.places[key]
        tensor = TensorProto(name=name, data_type=KINDS[self.precision], dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": DATA, "offset": str(offset), "length": str(length)}
        for entry, value in entries.items():
            tensor.external_data.add(key=entry, value=value)
        self.tensors.append(tensor)
        return name

    def small(self, name: str, values: NDArray[Any]) -> str:
        raw = _as_bytes(values.astype(np.float32), self.precision)
        kind = KINDS[self.precision]
        self.tensors.append(helper.make_tensor(name, kind, values.shape, raw, raw=True))
        return name

    def whole(self, name: str, values: Any, dtype: type[np.generic]) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def _normal(self, shape: tuple[int, ...], std: float) -> Iterator[bytes]:
        rows, step = shape[0], max(1, 2**24 // shape[1])
        for first in range(0, rows, step):
            count = min(step, rows - first)
            values = self.random.standard_normal((count, shape[1]), np.float32) * np.float32(std)
            yield _as_bytes(values, self.precision)


def _as_bytes(values: NDArray[np.float32], precision: str) -> bytes:
    if precision == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if precision == "fp16" else np.float32).tobytes()


def _graph(shape: Shape, precision: str, weights: _Weights) -> Any:
    kind, nodes = KINDS[precision], list[Any]()

    def op(kind: str, inputs: list[str], name: str, more: tuple[str, ...] = (), **how: Any) -> str:
        domain = MICROSOFT if kind in ("GroupQueryAttention", _SKIP) else ""
        outputs = [name, *more]
        nodes.append(helper.make_node(kind, inputs, outputs, f"/{name}", domain=domain, **how))
        return name

    lengths = _lengths(op, weights)
    angles = _angles(shape, weights)
    embedding = weights.normal("embed", (shape.vocab, shape.hidden), 1.0)
    x = op("Gather", [embedding, "input_ids"], "embedded")
    norm = weights.small("norm", np.ones(shape.hidden))
    normed = op("SimplifiedLayerNormalization", [x, norm], "normed", axis=-1, epsilon=1e-5)
    for layer in range(shape.layers):
        attended = _attention(op, weights, shape, layer, normed, [*lengths, *angles])
        x, normed = _add(op, f"{layer}.a", x, attended, norm)
        x, normed = _add(op, f"{layer}.m", x, _mlp(op, weights, shape, layer, normed), norm)
    std = LOGIT_STD / shape.hidden**0.5
    head = weights.normal("head", (shape.hidden, shape.vocab), std)
    op("MatMul", [normed, head], "logits")
    return helper.make_graph(nodes, "llama", *_ends(shape, kind), weights.tensors)


_SKIP = "SkipSimplifiedLayerNormalization"


def _add(op: Any, name: str, x: str, more: str, norm: str) -> tuple[str, str]:
    """The sum, and it normalised."""
    outputs = ("", "", f"{name}.sum")
    return f"{name}.sum", op(_SKIP, [x, more, norm], f"{name}.normed", outputs, epsilon=1e-5)


def _attention(
    op: Any, weights: _Weights, shape: Shape, layer: int, x: str, rest: list[str]
) -> str:
    wide = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    qkv = weights.normal(f"{layer}.qkv", (shape.hidden, wide), INITIALIZER, "qkv")
    packed = op("MatMul", [x, qkv], f"{layer}.packed")
    past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    attended = op(
        "GroupQueryAttention",
        [packed, "", "", *past, *rest],
        f"{layer}.attended",
        (f"present.{layer}.key", f"present.{layer}.value"),
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        scale=shape.head_size**-0.5,
        do_rotary=1,
    )
    sizes = (shape.heads * shape.head_size, shape.hidden)
    out = weights.normal(f"{layer}.out", sizes, INITIALIZER, "out")
    return str(op("MatMul", [attended, out], f"{layer}.projected"))


def _mlp(op: Any, weights: _Weights, shape: Shape, layer: int, x: str) -> str:
    def linear(name: str, x: str, *sizes: int) -> str:
        weight = weights.normal(f"{layer}.{name}.weight", sizes, INITIALIZER, name)
        return str(op("MatMul", [x, weight], f"{layer}.{name}"))

    gate = linear("gate", x, shape.hidden, shape.intermediate)
    up = linear("up", x, shape.hidden, shape.intermediate)
    act = op("Mul", [gate, op("Sigmoid", [gate], f"{layer}.sigmoid")], f"{layer}.act")
    return linear("down", op("Mul", [act, up], f"{layer}.mlp"), shape.intermediate, shape.hidden)


def _lengths(op: Any, weights: _Weights) -> list[str]:
    """Of each row less one, and of the longest, from the mask: as the builder has them."""
    mask, one = "attention_mask", weights.whole("one", [1], np.int64)
    total = op("Gather", [op("Shape", [mask], "mask_shape"), weights.whole("at", 1, np.int64)], "t")
    less = op("Sub", [op("ReduceSum", [mask, one], "counted", keepdims=0), one], "less")
    cast = {"to": TensorProto.INT32}
    return [op("Cast", [less], "lengths", **cast), op("Cast", [total], "total", **cast)]


def _angles(shape: Shape, weights: _Weights) -> list[str]:
    half = np.arange(0, shape.head_size, 2) / shape.head_size
    angle = np.outer(np.arange(shape.context), shape.rope_theta**-half)
    return [weights.small("cos_cache", np.cos(angle)), weights.small("sin_cache", np.sin(angle))]


def _ends(shape: Shape, kind: int) -> tuple[list[Any], list[Any]]:
    def info(name: str, kind: int, *sizes: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, ["batch_size", *sizes])

    inputs = [info(name, TensorProto.INT64, "length") for name in ("input_ids", "attention_mask")]
    outputs = [info("logits", kind, "length", shape.vocab)]
    for layer in range(shape.layers):
        for part in ("key", "value"):
            sizes = (shape.kv_heads, "past", shape.head_size)
            inputs.append(info(f"past_key_values.{layer}.{part}", kind, *sizes))
            outputs.append(info(f"present.{layer}.{part}", kind, *sizes))
    return inputs, outputs


def _config(shape: Shape) -> dict[str, Any]:
    names = {f"{part}_names": "%s.%%d.%s" for part in ("key", "value")}
    decoder = {
        "filename": GRAPH,
        "head_size": shape.head_size,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "inputs": {f"past_{k}": v % ("past_key_values", k[:-6]) for k, v in names.items()},
        "outputs": {f"present_{k}": v % ("present", k[:-6]) for k, v in names.items()},
    }
    model = {"type": "llama", "vocab_size": shape.vocab, "context_length": shape.context}
    return {"model": {**model, "eos_token_id": [0], "decoder": decoder}}


def _tokenizer(vocab: int) -> Tokenizer:
    """Bytes, and invented tokens up to the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"token{i}" for i in range(len(alphabet), vocab))]
    bpe = models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
