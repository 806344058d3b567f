"""KV memory on a device: the same rows as on the host, copied there without passing the bus.

One buffer for each layer's keys and one for its values, `[rows, kv_heads, length, head_size]`; past
and present are bound to the same memory by address. A position of a row is a run of bytes for each
head, so part of a row is `kv_heads` runs a buffer. All of it is taken at the start: nothing is
given back while a row is short (`paged`). Knows nothing of models or requests.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from orchestrator.errors import WorkerError
from workers.running.device_room import KINDS, SIZES, Room


@dataclass(frozen=True, slots=True, weakref_slot=True)
class DeviceBlock:
    """Some positions of a row, on their own: `[heads, length, size]` a buffer, one after another.

    Its memory is given back with it.
    """

    address: int
    length: int
    nbytes: int


class DeviceMemory:
    """Rows of KV on the device of `room`."""

    paged = False
    """A row holds its memory whether it is long or short."""

    def __init__(
        self,
        room: Room,
        kinds: Mapping[str, str],
        present: Mapping[str, str],
        rows: int,
        heads: int,
        length: int,
        size: int,
    ) -> None:
        """`kinds`: onnxruntime's type of each past input; `present`: the output that goes with it.

        Raises WorkerError: model (a type that is not known), memory (it cannot be had).
        """
        self._room, self._present = room, dict(present)
        self._shape = (heads, length, size)
        self.rows = rows
        for name, kind in kinds.items():
            if kind not in KINDS:
                raise WorkerError("model", f"not supported on this device: {name} of type {kind}")
        self._kinds = {name: KINDS[kind] for name, kind in kinds.items()}
        self._run = {name: size * SIZES[kind] for name, kind in self._kinds.items()}
        self._buffers: dict[str, int] = {}
        try:
            for name, run in self._run.items():
                self._buffers[name] = room.allocate(rows * heads * length * run)
        except WorkerError as error:
            self.close()
            wanted = f"{rows} rows of {length} tokens, {self.nbytes >> 20} MiB"
            raise WorkerError("memory", f"no memory for {wanted}: {error}") from error
        for name, address in self._buffers.items():
            room.clear(address, rows * heads * length * self._run[name])

    @property
    def bytes_per_token(self) -> int:
        """Of one position of one row."""
        return self._shape[0] * sum(self._run.values())

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return self.rows * self._shape[1] * self.bytes_per_token

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Past and present of rows first..first+count-1."""
        shape = (count, *self._shape)
        for name, kind in self._kinds.items():
            place = self._room.type, self._room.index, kind, shape, self._at(name, first, 0)
            binding.bind_input(name, *place)
            binding.bind_output(self._present[name], *place)

    def hold(self, first: int, ends: npt.ArrayLike, touched: int = 0) -> None:
        """Rows are about to end at `ends`: nothing to do, see `paged`."""

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one row into another."""
        for name, run in self._run.items():
            self._move(
                name, self._at(name, target, 0), None, self._at(name, source, 0), length * run
            )

    def read(self, row: int, start: int, end: int) -> DeviceBlock:
        """An own copy of positions start..end-1 of a row."""
        length = end - start
        size = length * self.bytes_per_token
        address = self._room.allocate(size)
        block = DeviceBlock(address, length, size)
        weakref.finalize(block, self._room.free, address)
        for name, run in self._run.items():
            width = length * run
            self._room.copy(
                address, width, self._at(name, row, start), self._pitch(name), width, self._shape[0]
            )
            address += width * self._shape[0]
        return block

    def write(self, row: int, start: int, block: DeviceBlock) -> None:
        """A block into positions start.. of a row: those it was read from, of any row."""
        address = block.address
        for name, run in self._run.items():
            width = block.length * run
            self._move(name, self._at(name, row, start), width, address, width)
            address += width * self._shape[0]

    def trim(self, row: int, length: int) -> None:
        """Nothing is given back: see `paged`."""

    def close(self) -> None:
        """Give all rows back."""
        for address in self._buffers.values():
            self._room.free(address)
        self._buffers.clear()

    def _pitch(self, name: str) -> int:
        """Bytes from one head's run to the next one's."""
        return self._shape[1] * self._run[name]

    def _at(self, name: str, row: int, position: int) -> int:
        heads = row * self._shape[0]
        return self._buffers[name] + heads * self._pitch(name) + position * self._run[name]

    def _move(self, name: str, target: int, packed: int | None, source: int, width: int) -> None:
        """Runs of `width` bytes into a row; `packed`: how far apart they lie at the source."""
        pitch = self._pitch(name)
        self._room.copy(target, pitch, source, packed or pitch, width, self._shape[0])
