"""An excerpt of a model in a session, timed: steps of so many rows, prompts of so many tokens.

Values mean nothing here, only seconds do. Knows nothing of which settings are better.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.folders.folder import ModelFolder
from workers.folders.prepare import LENGTHS, POSITIONS, TOTAL
from workers.measuring.excerpt import HIDDEN, Excerpt

OpenSession = Callable[[bytes, int, bool], Any]
"""(serialised graph, intra-op threads, spinning) -> onnxruntime.InferenceSession"""

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Array = npt.NDArray[np.generic]


class Trial:
    """One session of an excerpt, with the KV of `rows` rows of `length` positions."""

    def __init__(
        self,
        session: Any,
        excerpt: Excerpt,
        folder: ModelFolder,
        *,
        rows: int,
        past: int,
        prompt: int,
    ) -> None:
        """For up to `rows` rows that hold `past` tokens, and prompts of up to `prompt` tokens.

        Raises KeyError for a type of KV that the host does not compute with.
        """
        self._session, self._pairs, self._held = session, excerpt.past, past
        self._kinds = {each.name: each.type for each in session.get_inputs()}
        self._shape = (folder.kv_heads, folder.head_size)
        positions = max(rows * (past + 1), prompt)
        size = positions * folder.kv_heads * folder.head_size
        self._kv = {name: np.ones(size, _DTYPES[self._kinds[name]]) for name in excerpt.past}
        values = np.random.default_rng(0).standard_normal((max(rows, prompt), excerpt.width))
        self._hidden = values.astype(_DTYPES[self._kinds[HIDDEN]])

    def decode(self, rows: int) -> float:
        """Seconds of one token for each of `rows` rows."""
        return self._timed(rows, 1, self._held)

    def prefill(self, tokens: int) -> float:
        """Seconds of a prompt of `tokens` tokens in one row."""
        return self._timed(1, tokens, 0)

    def _timed(self, rows: int, width: int, past: int) -> float:
        binding = self._session.io_binding()
        given = self._given(rows, width, past)
        for name, value in given.items():
            _bind(binding.bind_input, name, value)
        heads, size = self._shape
        shape = (rows, heads, past + width, size)
        for name, present in self._pairs.items():
            held = self._kv[name][: math.prod(shape)].reshape(shape)
            _bind(binding.bind_input, name, held)
            _bind(binding.bind_output, present, held)
        began = time.perf_counter()
        self._session.run_with_iobinding(binding)
        return time.perf_counter() - began

    def _given(self, rows: int, width: int, past: int) -> dict[str, Array]:
        total = past + width
        every: dict[str, Array] = {
            HIDDEN: self._hidden[: rows * width].reshape(rows, width, -1),
            LENGTHS: np.full(rows, total - 1, np.int32),
            TOTAL: np.asarray(total, np.int32),
            POSITIONS: np.tile(np.arange(past, total, dtype=np.int64), (rows, 1)),
        }
        return {name: value for name, value in every.items() if name in self._kinds}


def _bind(bind: Any, name: str, value: Array) -> None:
    bind(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
