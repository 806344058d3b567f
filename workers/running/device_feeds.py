"""What a session on a device is fed with beside KV, and where its logits go.

A decode step changes two or three numbers a row: they lie in one run of device memory, at addresses
that never change, and one copy from pinned memory renews them. Prompts are bound from the host; a
session copies them when they are bound. Knows the inputs of a prepared graph
(folders/graph_edit.py), no rows of anybody, no KV.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import WorkerError
from workers.folders.prepare import LAST, LENGTHS, POSITIONS, TOTAL
from workers.running.device_room import KINDS, SIZES, DeviceLogits, Room

_IDS = "input_ids"
_WIDE, _NARROW = 8, 4  # bytes of int64, int32


class DeviceFeeds:
    """Inputs and logits for as many rows as there are."""

    def __init__(
        self, room: Room, rows: int, length: int, vocab: int, kind: str, positions: bool, grain: int
    ) -> None:
        """`length`: positions of a row of KV; `vocab`, `kind`: columns and type of the logits;
        `positions`: the graph asks for position_ids; `grain`: tokens of each prompt call, 1: any.
        """
        if kind not in KINDS:
            raise WorkerError("model", f"not supported on this device: logits of type {kind}")
        self._room, self._vocab, self._kind = room, vocab, KINDS[kind]
        self._positions, self._grain = positions, grain
        # Constant for a decode step: what an attention kernel makes of it (in how many parts it
        # splits the work) then follows from no row's length. It lies on the host for the operator.
        self._total = np.full((), length, np.int32)
        wide = rows * _WIDE
        stage = room.staging(2 * wide + rows * _NARROW)
        self._stage = stage
        self._tokens, self._places = stage[: 2 * wide].view(np.int64).reshape(2, rows)
        self._lengths = stage[2 * wide :].view(np.int32)
        self._owned: list[int] = []
        try:
            for size in (stage.nbytes, wide, rows * vocab * SIZES[self._kind]):
                self._owned.append(room.allocate(size))
        except WorkerError:
            self.close()
            raise
        ids, self._zeros, self._logits = self._owned
        room.clear(self._zeros, wide)
        self._addresses = {_IDS: ids, POSITIONS: ids + wide, LENGTHS: ids + 2 * wide}

    def bind_step(self, binding: Any, batch: int) -> None:
        """A decode step of so many rows."""
        device = self._room.type, self._room.index
        binding.bind_input(_IDS, *device, np.int64, (batch, 1), self._addresses[_IDS])
        binding.bind_input(LENGTHS, *device, np.int32, (batch,), self._addresses[LENGTHS])
        binding.bind_input(LAST, *device, np.int64, (batch, 1), self._zeros)
        if self._positions:
            place = self._addresses[POSITIONS]
            binding.bind_input(POSITIONS, *device, np.int64, (batch, 1), place)
        binding.bind_cpu_input(TOTAL, self._total)
        self._bind_logits(binding, batch)

    def step(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """The tokens of the rows 0.. and the positions they go to; the rows behind get token 0 at
        position 0, for calls of more rows than there are."""
        count = len(np.asarray(tokens))
        self._tokens[:count], self._lengths[:count] = tokens, lengths
        self._tokens[count:], self._lengths[count:] = 0, 0
        self._places[:] = self._lengths
        self._room.upload(self._addresses[_IDS], self._stage)

    def bind_prompt(
        self, binding: Any, tokens: Sequence[Sequence[int]], start: int, head: bool
    ) -> None:
        """Prompts, or one's part from `start` on; `head`: with the logits of each one's last token.

        Of several all begin at 0, and the shorter ones are filled up on the right.
        """
        lengths = np.array([len(each) for each in tokens])
        width = int(lengths.max()) if self._grain == 1 else self._grain
        ids = np.zeros((len(tokens), width), np.int64)
        for row, each in zip(ids, tokens, strict=True):
            row[: len(each)] = each
        # Of a call of one shape the filling counts as text: what it writes is overwritten later.
        ends = lengths if self._grain == 1 else np.full_like(lengths, width)
        values = {
            _IDS: ids,
            LENGTHS: (start + ends - 1).astype(np.int32),
            TOTAL: np.asarray(start + width, np.int32),
            LAST: (lengths - 1).astype(np.int64)[:, None],
        }
        if self._positions:
            values[POSITIONS] = np.tile(np.arange(start, start + width), (len(tokens), 1))
        for name, value in values.items():
            binding.bind_cpu_input(name, value)
        if head:
            self._bind_logits(binding, len(tokens))

    def logits(self, batch: int) -> DeviceLogits:
        """Those of the step just made; a new object each time."""
        return DeviceLogits(self._room, self._logits, self._kind, batch, self._vocab)

    def prompt_logits(self, count: int) -> npt.NDArray[np.float32]:
        """Those of the prompts just computed, on the host, float32 [count, vocab]."""
        return self.logits(count).fetch(range(count))

    def close(self) -> None:
        """Give the memory back."""
        for address in self._owned:
            self._room.free(address)
        self._owned.clear()

    def _bind_logits(self, binding: Any, rows: int) -> None:
        device = self._room.type, self._room.index
        binding.bind_output("logits", *device, self._kind, (rows, self._vocab), self._logits)
