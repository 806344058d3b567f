"""Memory of a device, and logits that lie there; which library calls a type by which name.

Knows how tensors are laid out and named, nothing of onnxruntime, of CUDA, of models or of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

KINDS: dict[str, int] = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(bfloat16)": TensorProto.BFLOAT16,
}
"""onnxruntime's words for the element types of logits and KV -> TensorProto's numbers."""

SIZES: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}


class Room(Protocol):
    """Memory of one device. Addresses are numbers; work is done in the order it was asked for, and
    before anything that a session of this device does later. Raises WorkerError: memory, runtime.
    """

    type: str
    """As onnxruntime names the device: cuda."""
    index: int

    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def clear(self, address: int, size: int) -> None:
        """Fill with zeros."""
        ...

    def copy(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
    ) -> None:
        """`height` runs of `width` bytes, which begin a pitch apart, within the device."""
        ...

    def upload(self, target: int, values: NDArray[Any]) -> None:
        """From contiguous memory of the host; `values` may be changed once a session has run."""
        ...

    def download(self, values: NDArray[Any], source: int) -> None:
        """Into contiguous memory of the host; done on return."""
        ...

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Memory of the host from which `upload` is fast; it lives as long as the room."""
        ...

    def free_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLogits:
    """Logits of a step where they were computed: [rows, width], valid until the next step.

    `kind` is a TensorProto type. As an array (`numpy.asarray`) they are float32, fetched anew.
    """

    room: Room
    address: int
    kind: int
    rows: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.width

    def __len__(self) -> int:
        return self.rows

    def address_of(self, row: int) -> int:
        """Where a row begins; IndexError if there is none."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        return self.address + row * self.width * SIZES[self.kind]

    def fetch(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Some rows on the host, float32 [len(rows), width]."""
        raw = np.empty((len(rows), self.width * SIZES[self.kind]), np.uint8)
        for place, row in enumerate(rows):
            self.room.download(raw[place], self.address_of(row))
        return as_float32(raw, self.kind)

    def __array__(
        self, dtype: Any = None, copy: bool | None = None
    ) -> NDArray[np.float32] | NDArray[Any]:
        if copy is False:
            raise ValueError("logits of a device have to be copied")
        values = self.fetch(range(self.rows))
        return values if dtype is None else values.astype(dtype, copy=False)


def as_float32(raw: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    """Bytes of numbers of a kind, [n, bytes] -> [n, numbers]; numpy has no bfloat16."""
    if kind == TensorProto.BFLOAT16:
        wide: NDArray[np.uint32] = raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    return raw.view(dtype).astype(np.float32)
