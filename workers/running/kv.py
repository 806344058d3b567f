"""The KV memory of a batch on the host: rows of one length, of which only what is used is held.

One buffer for each layer's keys and one for its values, `[rows, kv_heads, length, head_size]`, in
anonymous memory: the system gives a page when it is first written, so a row of 4096 positions that
holds 100 tokens costs 100 tokens, and rows of any lengths share what there is without a copy.
docs/decisions/0014-memory-of-rows.md has the figures. Knows nothing of sessions, tokens or slots.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import WorkerError

Array = npt.NDArray[Any]

# As onnxruntime says it -> how numpy stores it, and what a binding calls it: numpy has no bfloat16,
# so that is passed by its number in TensorProto.
ELEMENTS: dict[str, tuple[type[np.generic], Any]] = {
    "tensor(float)": (np.float32, np.float32),
    "tensor(float16)": (np.float16, np.float16),
    "tensor(bfloat16)": (np.uint16, 16),
}
_FLAGS = ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_NORESERVE")


@dataclass(frozen=True, slots=True)
class Block:
    """A copy of some positions of a row: for each buffer `[kv_heads, length, head_size]`."""

    parts: tuple[Array, ...]

    @property
    def length(self) -> int:
        """Positions."""
        return int(self.parts[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(part.nbytes for part in self.parts)


class HostMemory:
    """Rows of KV; a position that was never written costs nothing."""

    def __init__(
        self,
        kinds: Mapping[str, str],
        present: Mapping[str, str],
        *,
        rows: int,
        heads: int,
        length: int,
        size: int,
        room: int | None = None,
    ) -> None:
        """`kinds`: the element type of each past input, as onnxruntime says it; `present`: the
        output that goes with each.

        `room`: positions of all rows together that may stay in memory after nobody needs them
        any more. None: as many as there are, in pages of 2 MiB, which are some percent faster and
        hold what was never written as well. Raises WorkerError "memory".
        """
        self._present, self._kinds = dict(present), dict(kinds)
        self._rows, self._heads, self._length, self._room = rows, heads, length, room
        shape = (rows, heads, length, size)
        try:
            self._maps = {name: _map(shape, kind, room is None) for name, kind in kinds.items()}
        except (OSError, OverflowError, ValueError, MemoryError) as error:
            raise WorkerError(
                "memory", f"no memory for {rows} rows of {length}: {error}"
            ) from error
        self._arrays: dict[str, Array] = {
            name: np.frombuffer(memory, ELEMENTS[kinds[name]][0]).reshape(shape)
            for name, memory in self._maps.items()
        }
        self._needed, self._touched = np.zeros(rows, np.int64), np.zeros(rows, np.int64)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position of one row."""
        return sum(array[0, :, 0].nbytes for array in self._arrays.values())

    @property
    def nbytes(self) -> int:
        """Bytes of address space: what all rows at full length would hold."""
        return sum(array.nbytes for array in self._arrays.values())

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Past and present of the rows `first`.. to the same memory: a step writes in place."""
        for name, array in self._arrays.items():
            rows, element = array[first : first + count], ELEMENTS[self._kinds[name]][1]
            binding.bind_input(name, "cpu", 0, element, rows.shape, rows.ctypes.data)
            binding.bind_output(
                self._present[name], "cpu", 0, element, rows.shape, rows.ctypes.data
            )

    def hold(self, first: int, ends: npt.ArrayLike, touched: int = 0) -> None:
        """The rows `first`.. are about to end at positions `ends`; what lies behind is not needed.

        `touched`: they will be written up to there (padding). Whoever writes rows without `copy`
        and `write` says so here before.
        """
        if self._room is None:
            return
        ends = np.asarray(ends)
        rows = slice(first, first + len(ends))
        self._needed[rows] = ends
        reached = self._touched[rows]
        np.maximum(reached, np.maximum(ends, touched) if touched else ends, out=reached)
        if self._touched.sum() > self._room:
            self._give_back()

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one row into another."""
        self.hold(target, [length])
        for array in self._arrays.values():
            array[target, :, :length] = array[source, :, :length]

    def read(self, row: int, start: int, end: int) -> Block:
        """A copy of positions `start`..`end`-1 of a row."""
        return Block(tuple(array[row, :, start:end].copy() for array in self._arrays.values()))

    def write(self, row: int, start: int, block: Block) -> None:
        """What was read of any row, from position `start` on; the row ends behind it."""
        end = start + block.length
        self.hold(row, [end])
        for array, part in zip(self._arrays.values(), block.parts, strict=True):
            array[row, :, start:end] = part

    def trim(self, row: int, length: int) -> None:
        """Positions from `length` on are not needed; given back when the room is short."""
        self._needed[row] = min(length, self._needed[row])

    def close(self) -> None:
        """Give all of it back; nothing may be bound to it any more."""
        self._arrays.clear()
        self._maps.clear()

    def _give_back(self) -> None:
        for row in np.flatnonzero(self._touched > self._needed).tolist():
            self._release(row, int(self._needed[row]), int(self._touched[row]))
            self._touched[row] = self._needed[row]

    def _release(self, row: int, start: int, end: int) -> None:
        """Give the pages back that hold nothing but positions `start`..`end`-1 of a row."""
        page, advice = mmap.PAGESIZE, getattr(mmap, "MADV_DONTNEED", None)
        if advice is None:  # not here: the pages stay until they are written again
            return
        for name, array in self._arrays.items():
            stride = array.strides[1]
            step = array.strides[2]
            for head in range(row * self._heads, (row + 1) * self._heads):
                first = -(-(head * stride + start * step) // page) * page
                last = min(
                    -(-(head * stride + end * step) // page) * page,
                    (head + 1) * stride // page * page,
                )
                if last > first:
                    self._maps[name].madvise(advice, first, last - first)


def _map(shape: tuple[int, ...], kind: str, huge: bool) -> mmap.mmap:
    if kind not in ELEMENTS:
        raise WorkerError("model", f"not supported on this device: KV of type {kind}")
    size = int(np.prod(shape, dtype=object)) * np.dtype(ELEMENTS[kind][0]).itemsize
    flags = 0
    for flag in _FLAGS:
        flags |= getattr(mmap, flag, 0)
    memory = mmap.mmap(-1, size, flags=flags)
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        memory.madvise(advice)
    return memory
