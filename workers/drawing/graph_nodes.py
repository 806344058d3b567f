"""An ONNX graph that grows node by node: constants, operators, and the few shapes in use here.

Values are matrices of one row a choice; what is reduced is reduced along the columns. Knows
protobuf (through `onnx`), nothing of what is computed.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

# CUDA kernels for every operator of this set that is used here have been there for years.
OPSET, IR_VERSION = 18, 9


class Nodes:
    """The nodes and constants so far; each method returns the name of the value it makes."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._initializers: list[Any] = []

    def put(self, value: Any, dtype: type[np.generic]) -> str:
        """A constant; the same one twice is one."""
        array: NDArray[Any] = np.asarray(value, dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def f32(self, value: float) -> str:
        return self.put(value, np.float32)

    def f64(self, value: float) -> str:
        return self.put(value, np.float64)

    def ints(self, *values: int) -> str:
        """A list of whole numbers, int64."""
        return self.put(values, np.int64)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node of several outputs."""
        names = [f"v{len(self._nodes)}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def cast(self, x: str, to: int) -> str:
        """`x` as TensorProto type `to`."""
        return self.op("Cast", x, to=to)

    def sum(self, x: str) -> str:
        """[B, n] -> [B, 1]."""
        return self.op("ReduceSum", x, self.ints(1), keepdims=1)

    def count(self, condition: str) -> str:
        """How many columns are true: bool [B, n] -> int64 [B, 1]."""
        return self.sum(self.cast(condition, TensorProto.INT64))

    def largest(self, x: str) -> str:
        """[B, n] -> [B, 1]."""
        return self.op("ReduceMax", x, self.ints(1), keepdims=1)

    def columns(self, x: str, start: int, end: int) -> str:
        """[B, n] -> [B, end - start]."""
        return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(1))

    def at(self, x: str, index: str) -> str:
        """In each row of `x` [B, n] the columns of its row of `index` [B, m] -> [B, m]."""
        return self.op("GatherElements", x, index, axis=1)

    def smaller(self, a: str, b: str) -> str:
        """Of whole numbers; onnxruntime's Min and Max of int64 err on x86-64 (by Eigen's SSE2)."""
        return self.op("Where", self.op("Less", a, b), a, b)

    def larger(self, a: str, b: str) -> str:
        """Of whole numbers."""
        return self.op("Where", self.op("Less", a, b), b, a)

    def either(self, *flags: str) -> str:
        """True where any is."""
        whole = flags[0]
        for flag in flags[1:]:
            whole = self.op("Or", whole, flag)
        return whole

    def model(self, name: str, inputs: list[Any], outputs: dict[str, Any]) -> bytes:
        """The whole, serialized; `outputs`: which value goes out, and as what."""
        for value, info in outputs.items():
            self._nodes.append(helper.make_node("Identity", [value], [info.name]))
        used = {value for node in self._nodes for value in node.input}
        constants = [each for each in self._initializers if each.name in used]
        graph = helper.make_graph(self._nodes, name, inputs, list(outputs.values()), constants)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        serialized: bytes = model.SerializeToString()
        return serialized
