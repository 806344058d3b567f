"""The small inputs of a call, and its logits, in memory of the host.

For decode steps everything lies ready and is bound once: a step allocates nothing. A prompt's
inputs are made for its call. Knows the graph's inputs by name; nothing of KV memory or of rows'
meaning.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import WorkerError
from workers.folders.prepare import LAST, LENGTHS, POSITIONS, TOTAL

Logits = npt.NDArray[np.float32]
_LOGITS: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


SPARE = 4
"""Positions behind a row's longest text that padding may be written to."""
_L2_KIB = (256, 512, 1024, 1280, 1536, 2048, 3072, 4096)


def even_width(width: int, head_size: int) -> int:
    """The least width of a prompt call, from `width` on, that leaves no token alone.

    GroupQueryAttention computes in blocks of some rows; a last block of one row goes another way
    (as a decode step does), so that its last bits would depend on where a prompt was cut. A block
    has 2 * head_size rows, or fewer where the processor's second cache is small (onnxruntime 1.31,
    float32). One token is as it is.
    """
    blocks = {min(kib * 1024 // (32 * head_size), 2 * head_size) for kib in _L2_KIB}
    while width > 1 and any(block > 1 and width % block == 1 for block in blocks):
        width += 1
    return width


class HostFeeds:
    """Inputs and logits of up to `rows` rows."""

    def __init__(self, rows: int, head_size: int, vocab: int, kind: str, positions: bool) -> None:
        """`kind`: the logits' element type, as onnxruntime says it; `positions`: the graph has an
        input `position_ids`.

        Raises WorkerError "model" for a kind of logits that is not supported, "memory".
        """
        if kind not in _LOGITS:
            raise WorkerError("model", f"not supported on this device: logits of type {kind}")
        self._positions, self._head_size = positions, head_size
        try:
            self._logits = np.zeros((rows, vocab), _LOGITS[kind])
            self._prompt = np.zeros((rows, vocab), _LOGITS[kind])
            self._wide = self._logits
            if self._logits.dtype != np.float32:
                self._wide = np.zeros((rows, vocab), np.float32)
        except (MemoryError, ValueError) as error:  # numpy: a size that no address reaches
            raise WorkerError("memory", f"no memory for the logits of {rows} rows") from error
        self._tokens, self._at = np.zeros((rows, 1), np.int64), np.zeros((rows, 1), np.int64)
        self._lengths, self._total = np.zeros(rows, np.int32), np.zeros((), np.int32)
        self._last = np.zeros((rows, 1), np.int64)
        self._kept: dict[str, npt.NDArray[Any]] = {}

    def bind_step(self, binding: Any, batch: int) -> None:
        """Bind what `step` fills for `batch` rows, and their logits."""
        _bind(binding, "input_ids", self._tokens[:batch])
        _bind(binding, LENGTHS, self._lengths[:batch])
        _bind(binding, TOTAL, self._total)
        _bind(binding, LAST, self._last[:batch])
        if self._positions:
            _bind(binding, POSITIONS, self._at[:batch])
        _bind_logits(binding, self._logits[:batch])

    def step(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """A decode step's inputs: a token and how many were before it, for each row."""
        batch = len(np.asarray(tokens))
        self._tokens[:batch, 0] = tokens
        self._lengths[:batch] = lengths
        self._total[...] = self._lengths[:batch].max() + 1
        if self._positions:
            self._at[:batch, 0] = lengths

    def bind_prompt(
        self, binding: Any, tokens: Sequence[Sequence[int]], start: int, head: bool
    ) -> None:
        """Bind positions `start`.. of the rows' prompts, right-padded; with `head` their logits.

        Up to `SPARE` positions behind the longest are written as well.
        """
        lengths = np.array([len(each) for each in tokens], np.int64)
        count, width = len(tokens), even_width(int(lengths.max()), self._head_size)
        ids = np.zeros((count, width), np.int64)
        for row, each in zip(ids, tokens, strict=True):
            row[: len(each)] = each
        self._kept = {
            "input_ids": ids,
            # Where something is before them, padding counts: the kernel counts back from the end.
            LENGTHS: (np.full(count, start + width) if start else lengths).astype(np.int32) - 1,
            TOTAL: np.asarray(start + width, np.int32),
            LAST: (lengths - 1)[:, None],
        }
        if self._positions:
            self._kept[POSITIONS] = np.tile(np.arange(start, start + width), (count, 1))
        for name, value in self._kept.items():
            _bind(binding, name, value)
        if head:
            _bind_logits(binding, self._prompt[:count])

    def logits(self, batch: int) -> Logits:
        """Of the last step: float32 `[batch, vocab]`, valid until the next one."""
        if self._wide is not self._logits:
            self._wide[:batch] = self._logits[:batch]
        wide: Logits = self._wide[:batch]
        return wide

    def prompt_logits(self, count: int) -> Logits:
        """Of the last prompts computed with the head: a copy, float32 `[count, vocab]`."""
        return self._prompt[:count].astype(np.float32)

    def close(self) -> None:
        """Nothing to give back: the memory goes with this object."""


def _bind(binding: Any, name: str, value: npt.NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)


def _bind_logits(binding: Any, rows: npt.NDArray[Any]) -> None:
    binding.bind_output("logits", "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
