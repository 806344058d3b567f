"""What one step must read and multiply, counted in a model's graph: its weights, not its time.

A decode step reads every weight once, however many rows it has, and multiplies each with every row;
of the embedding it reads one row a token. Knows nothing of devices or of how long anything takes.
"""

import math
from dataclasses import dataclass

from onnx import GraphProto, NodeProto, TensorProto, helper

_LOOK_UP = {"Gather", "GatherBlockQuantized"}  # a row a token
_PRODUCTS = {"MatMul", "Gemm", "MatMulIntegerToFloat"}
_SAME_WEIGHTS = {"Transpose", "Reshape", "Cast", "Identity", "DequantizeLinear"}
_HALF_BYTES = {TensorProto.INT4, TensorProto.UINT4}


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one step: bytes of weights read, and multiply-adds for each row."""

    weight_bytes: int
    multiply_adds: int
    head_multiply_adds: int  # of them the language head's, for the last token of a prompt alone
    quantized: bool  # most multiply-adds are of quantized weights


def step_costs(graph: GraphProto) -> Costs:
    """Count a whole graph's, of which the language head's is the last matrix."""
    weights = {each.name: each for each in graph.initializer}
    source = sources(graph, weights)
    read: set[str] = set()
    dense = quantized = head = 0
    for node in graph.node:
        if node.op_type in _LOOK_UP or node.op_type in _SAME_WEIGHTS:
            continue
        names = [source[name] for name in node.input if name in source]
        read.update(names)
        if node.op_type == "MatMulNBits":
            head = _attribute(node, "K") * _attribute(node, "N")
            quantized += head
        elif node.op_type in _PRODUCTS and names:
            head = sum(math.prod(weights[name].dims) for name in names if _matrix(weights[name]))
            if node.op_type == "MatMulIntegerToFloat":
                quantized += head
            else:
                dense += head
    size = sum(tensor_bytes(weights[name]) for name in read)
    return Costs(size, dense + quantized, head, quantized > dense)


def tensor_bytes(tensor: TensorProto) -> int:
    """The size of a tensor's data, wherever it lies."""
    elements: int = math.prod(tensor.dims)
    if tensor.data_type in _HALF_BYTES:
        return (elements + 1) // 2
    return elements * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def sources(graph: GraphProto, weights: dict[str, TensorProto]) -> dict[str, str]:
    """Which initializer stands behind a name: itself, or what was turned or cast from it."""
    source = {name: name for name in weights}
    for node in graph.node:
        if node.op_type in _SAME_WEIGHTS and node.input and node.input[0] in source:
            source.update(dict.fromkeys(node.output, source[node.input[0]]))
    return source


def _matrix(tensor: TensorProto) -> bool:
    return len(tensor.dims) == 2


def _attribute(node: NodeProto, name: str) -> int:
    return next((int(each.i) for each in node.attribute if each.name == name), 0)
