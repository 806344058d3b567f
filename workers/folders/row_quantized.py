"""A graph in fp32 made one whose matrices are int8: weights by column, activations row by row.

    y[r, n] = m[r] c[n] / 127 * sum over k of q[r, k] w[k, n]
    c[n] = max over k of |W[k, n]| / 127,  w = round(W / c)
    m[r] = max over k of |x[r, k]|,        q = round(127 x / m)

c and w are made here, once; m and q in the graph, at every step. The scale of a row is its own, and
sums of integers have no order: no row depends on its neighbours, nor on how many tokens are
computed together. The scheme is that of LLM.int8() (Dettmers et al. 2022) without its outliers.

Knows files and nodes; nothing of sessions or of who asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

DATA = "model.onnx.data"
ROW_PRODUCT = "MatMulIntegerToFloat"
LEAST = 256  # weights of a matrix that is worth it
_ALIGNED = 4096
_LARGEST = 127
_ZERO = 128  # the kernels take unsigned rows
_DOMAIN = "com.microsoft"
_TINY = np.float32(2.0**-100)  # a row of zeros has a scale too


def quantize(graph: Path, output: Path) -> int:
    """Write the quantized graph into the folder `output`, with its weights; how many matrices.

    The weights are read and written one by one. Raises OSError; ValueError where the graph has
    no matrix to quantize.
    """
    model = onnx.load(str(graph), load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = [node for node in model.graph.node if _is_wanted(node, weights)]
    if not wanted:
        raise ValueError(f"{graph}: no MatMul with a constant matrix in float32")
    matrices = {node.input[1] for node in wanted}
    with (output / DATA).open("wb") as stream:
        kept = _Weights(model, graph.parent, stream)
        for name, tensor in weights.items():
            if name in matrices:
                kept.matrix(tensor)
            if name not in matrices or _is_used_elsewhere(model, name, wanted):
                kept.copy(tensor)
    nodes = list(_rewritten(model, {id(node) for node in wanted}))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept.tensors, *_constants()])
    _import(model)
    onnx.save_model(model, str(output / graph.name))
    return len(wanted)


def probe() -> tuple[bytes, np.ndarray, float]:
    """A graph of one product at the ends of its ranges, its rows [1, K], and each result.

    Kernels of processors without instructions for sums of products in 8 bits add two products in 16
    bits, where these do not fit.
    """
    length, columns = 64, 16
    matrix = np.full((length, columns), _LARGEST, np.int8)
    weights = [
        numpy_helper.from_array(matrix, "w"),
        numpy_helper.from_array(np.ones(columns, np.float32), "c"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.array(_ZERO, np.uint8), "zero"),
    ]
    inputs = ["q", "w", "one", "c", "zero"]
    node = helper.make_node(ROW_PRODUCT, inputs, ["y"], "product", domain=_DOMAIN)
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("q", TensorProto.UINT8, [1, length])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    rows = np.full((1, length), _ZERO + _LARGEST, np.uint8)
    return model.SerializeToString(), rows, float(length * _LARGEST**2)


def _is_wanted(node: NodeProto, weights: dict[str, TensorProto]) -> bool:
    if node.op_type != "MatMul" or node.input[1] not in weights:
        return False
    tensor = weights[node.input[1]]
    shaped = len(tensor.dims) == 2 and int(np.prod(tensor.dims)) >= LEAST
    return shaped and tensor.data_type == TensorProto.FLOAT


def _is_used_elsewhere(model: ModelProto, name: str, wanted: list[NodeProto]) -> bool:
    known = {id(node) for node in wanted}
    return any(name in node.input for node in model.graph.node if id(node) not in known)


@dataclass
class _Weights:
    """What of the weights goes on, written as it comes."""

    model: ModelProto
    folder: Path
    stream: BinaryIO
    tensors: list[TensorProto] = field(default_factory=list)

    def copy(self, tensor: TensorProto) -> None:
        if tensor.data_location == TensorProto.EXTERNAL:
            self._write(tensor.name, self._read(tensor), tensor.data_type)
        else:
            self.tensors.append(tensor)

    def matrix(self, tensor: TensorProto) -> None:
        """The matrix [K, N] in int8, and c / 127 [N] in float32."""
        full = self._read(tensor)
        whole = np.empty(full.shape, np.int8)
        scales = np.abs(full).max(axis=0) / np.float32(_LARGEST)
        np.maximum(scales, _TINY, out=scales)
        rows = max(1, 2**24 // full.shape[1])
        for first in range(0, len(full), rows):
            part = full[first : first + rows] / scales
            whole[first : first + rows] = np.rint(part, out=part)
        self._write(_quantized(tensor.name), whole, TensorProto.INT8)
        self._write(_scales(tensor.name), scales / np.float32(_LARGEST), TensorProto.FLOAT)

    def _read(self, tensor: TensorProto) -> np.ndarray:
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        entry = {item.key: item.value for item in tensor.external_data}
        return np.memmap(
            self.folder / entry["location"],
            helper.tensor_dtype_to_np_dtype(tensor.data_type),
            "r",
            int(entry.get("offset", 0)),
            tuple(tensor.dims),
        )

    def _write(self, name: str, array: np.ndarray, kind: int) -> None:
        self.stream.write(bytes(-self.stream.tell() % _ALIGNED))
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        told = {"location": DATA, "offset": self.stream.tell(), "length": array.nbytes}
        for key, value in told.items():
            tensor.external_data.add(key=key, value=str(value))
        array.tofile(self.stream)
        self.tensors.append(tensor)


def _rewritten(model: ModelProto, wanted: set[int]) -> Iterator[NodeProto]:
    quantized = set[str]()
    for node in model.graph.node:
        if id(node) not in wanted:
            yield node
            continue
        rows, matrix = node.input
        if rows not in quantized:
            quantized.add(rows)
            yield from _rows(rows)
        yield from _product(node, rows, matrix)


def _rows(name: str) -> Iterator[NodeProto]:
    """Its values by row in 8 bits, from -127 to 127 above `_ZERO`, and the rows' largest."""
    at = f"{name}/rows"
    yield helper.make_node("Abs", [name], [f"{at}/abs"], f"{at}/Abs")
    yield helper.make_node(
        "ReduceMax", [f"{at}/abs", "/rows/last"], [f"{at}/max"], f"{at}/ReduceMax", keepdims=1
    )
    yield helper.make_node("Max", [f"{at}/max", "/rows/tiny"], [f"{at}/largest"], f"{at}/Max")
    yield helper.make_node("Div", [name, f"{at}/largest"], [f"{at}/scaled"], f"{at}/Div")
    inputs = [f"{at}/scaled", "/rows/unit", "/rows/zero"]
    yield helper.make_node("QuantizeLinear", inputs, [f"{at}/q"], f"{at}/QuantizeLinear")


def _product(node: NodeProto, rows: str, matrix: str) -> Iterator[NodeProto]:
    at, out = f"{rows}/rows", node.output[0]
    inputs = [f"{at}/q", _quantized(matrix), "/rows/one", _scales(matrix), "/rows/zero"]
    yield helper.make_node(
        ROW_PRODUCT, inputs, [f"{out}/columns"], f"{node.name}/int8", domain=_DOMAIN
    )
    yield helper.make_node("Mul", [f"{out}/columns", f"{at}/largest"], [out], f"{node.name}/Mul")


def _constants() -> list[TensorProto]:
    values = {
        "/rows/last": np.array([-1], np.int64),
        "/rows/unit": np.float32(1 / _LARGEST),
        "/rows/tiny": _TINY,
        "/rows/one": np.float32(1),
        "/rows/zero": np.uint8(_ZERO),
    }
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _import(model: ModelProto) -> None:
    if all(each.domain != _DOMAIN for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))


def _quantized(name: str) -> str:
    return f"{name}/int8"


def _scales(name: str) -> str:
    return f"{name}/scales"
