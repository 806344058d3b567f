"""Memory of the host in the place of a device's: the same addresses, pitches and bindings.

What runs on it here is what runs on a GPU, but for the calls of the CUDA runtime themselves.
"""

import ctypes
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

ALIGNED = 64


class HostRoom:
    """`held` are the addresses that were not given back, and their sizes."""

    type, index = "cpu", 0

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, size: int) -> int:
        memory = np.full(size + ALIGNED, 0xA5, np.uint8)  # nobody may count on zeros
        address = -(-memory.ctypes.data // ALIGNED) * ALIGNED
        self.held[address], self._kept[address] = size, memory
        return address

    def free(self, address: int) -> None:
        del self.held[address], self._kept[address]

    def clear(self, address: int, size: int) -> None:
        self._check(address, size)
        ctypes.memset(address, 0, size)

    def copy(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
    ) -> None:
        assert width <= min(target_pitch, source_pitch)
        for i in range(height):
            self._check(target + i * target_pitch, width)
            self._check(source + i * source_pitch, width)
            ctypes.memmove(target + i * target_pitch, source + i * source_pitch, width)

    def upload(self, target: int, values: NDArray[Any]) -> None:
        assert values.flags.c_contiguous
        self._check(target, values.nbytes)
        ctypes.memmove(target, values.ctypes.data, values.nbytes)

    def download(self, values: NDArray[Any], source: int) -> None:
        assert values.flags.c_contiguous
        self._check(source, values.nbytes)
        ctypes.memmove(values.ctypes.data, source, values.nbytes)

    def staging(self, size: int) -> NDArray[np.uint8]:
        return np.zeros(size, np.uint8)

    def free_bytes(self) -> int:
        return 2**33

    def put(self, values: NDArray[Any]) -> int:
        """Memory of its own that holds `values`."""
        address = self.allocate(values.nbytes)
        self.upload(address, np.ascontiguousarray(values))
        return address

    def _check(self, address: int, size: int) -> None:
        assert any(a <= address and address + size <= a + n for a, n in self.held.items()), (
            f"{size} bytes at {address:#x} are not ours"
        )


def open_session(graph: bytes) -> Any:
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
