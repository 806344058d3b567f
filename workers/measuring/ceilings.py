"""The ceilings of this machine, measured: how fast memory is read, how fast matrices multiply.

Each is the best of several tries within about half a second, since whatever else runs can only slow
a try. The matrix rates are those of onnxruntime, which is what runs. Knows nothing of models.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from workers.measuring.trial import OpenSession
from workers.running.machine import Machine

SECONDS = 0.5
_LEAST_ARRAY, _MOST_ARRAY = 256 << 20, 2 << 30
_ROWS, _SIZE, _BLOCK = (
    256,
    2048,
    32,
)  # of the matrices: they stay in the cache, so memory is no limit


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second; floating-point operations (two for each multiply-add) a second."""

    read_bandwidth: float
    fp32_rate: float
    int4_rate: float  # weights of 4 bits, MatMulNBits at accuracy level 4

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of both in each: the lower was disturbed."""
        return Ceilings(
            max(self.read_bandwidth, other.read_bandwidth),
            max(self.fp32_rate, other.fp32_rate),
            max(self.int4_rate, other.int4_rate),
        )


def measure(machine: Machine, threads: int, open_session: OpenSession) -> Ceilings:
    """All of them, with so many threads; `open_session` as in trial.py, on the host."""
    return Ceilings(
        read_bandwidth=read_bandwidth(machine, threads),
        fp32_rate=_rate(open_session(_dense().SerializeToString(), threads, True)),
        int4_rate=_rate(open_session(_quantized().SerializeToString(), threads, True)),
    )


def read_bandwidth(machine: Machine, threads: int, seconds: float = SECONDS) -> float:
    """Bytes a second that so many threads together read from an array beyond every cache."""
    array = np.ones(array_bytes(machine) // 8, np.int64)
    parts = np.array_split(array, threads)
    with ThreadPoolExecutor(threads) as pool:
        # Of numpy's reductions the one that does least beside reading; it releases the lock.
        best = _fastest(lambda: list(pool.map(np.bitwise_or.reduce, parts)), seconds)
    return array.nbytes / best


def array_bytes(machine: Machine) -> int:
    """Well beyond the last cache, and within an eighth of the memory."""
    size = min(max(2 * machine.cache_bytes, _LEAST_ARRAY), _MOST_ARRAY)
    return min(size, machine.memory_bytes // 8) if machine.memory_bytes else size


def _rate(session: object) -> float:
    rows = np.random.default_rng(0).standard_normal((_ROWS, _SIZE)).astype(np.float32)
    run: Callable[..., object] = session.run  # type: ignore[attr-defined]
    return 2 * _ROWS * _SIZE * _SIZE / _fastest(lambda: run(None, {"rows": rows}), SECONDS / 2)


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of as many calls as fit, at least three."""
    call()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < deadline:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _dense() -> ModelProto:
    weights = np.random.default_rng(1).standard_normal((_SIZE, _SIZE)).astype(np.float32)
    node = helper.make_node("MatMul", ["rows", "weights"], ["out"])
    return _model(node, weights=weights)


def _quantized() -> ModelProto:
    source = np.random.default_rng(1)
    blocks = _SIZE // _BLOCK
    node = helper.make_node(
        "MatMulNBits",
        ["rows", "weights", "scales"],
        ["out"],
        domain="com.microsoft",
        K=_SIZE,
        N=_SIZE,
        bits=4,
        block_size=_BLOCK,
        accuracy_level=4,
    )
    return _model(
        node,
        weights=source.integers(0, 256, (_SIZE, blocks, _BLOCK // 2), np.uint8),
        scales=source.standard_normal((_SIZE, blocks)).astype(np.float32),
    )


def _model(node: NodeProto, **weights: npt.NDArray[np.generic]) -> ModelProto:
    from onnx import numpy_helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "ceiling",
        [info("rows", TensorProto.FLOAT, [_ROWS, _SIZE])],
        [info("out", TensorProto.FLOAT, [_ROWS, _SIZE])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
