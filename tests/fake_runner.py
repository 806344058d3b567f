"""A runner without a model: its logits are a hash of what was computed into the row.

A position's KV is a hash of its token, of the KV before it, and of the path that computed it: by a
prefill or by a decode step, which differ in the last bits on a real device. Whatever is written to
the wrong row or position, lost in a move, taken from another prompt, from generated tokens, or
computed in a chunk of one token changes every logit that follows. What no row may be asked for is
an AssertionError: positions that nobody computed, rows that are not there, more than the capacity.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
PREFILL, DECODE = 0, 1
BYTES_PER_TOKEN = 64


@dataclass(frozen=True)
class FakeBlock:
    """A row's tokens and KV from `start` on."""

    start: int
    tokens: npt.NDArray[np.int64]
    kv: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return len(self.tokens) * BYTES_PER_TOKEN


class FakeRunner:
    """`calls`: each call that computed prompts, as (rows, tokens of each, start)."""

    def __init__(
        self,
        vocab_size: int,
        slots: int = 8,
        max_length: int = 128,
        staging: int = 4,
        capacity: int | None = None,
        grain: int = 1,
    ) -> None:
        self.vocab_size, self.slots, self.max_length = vocab_size, slots, max_length
        self.staging, self.capacity = staging, capacity or slots * max_length
        self.grain = grain
        self._empty()
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        self.steps = 0

    @property
    def prefills(self) -> int:
        """Prompts that were begun from their first token."""
        return sum(len(rows) for rows, _, start in self.calls if start == 0)

    @property
    def prefilled(self) -> int:
        """Tokens that prompts were computed for."""
        return sum(sum(tokens) for _, tokens, _ in self.calls)

    @property
    def held(self) -> int:
        """Tokens in all rows."""
        return int((self.memory >= 0).sum())

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> Logits:
        assert len(tokens) > 1 or start == 0 or self.grain > 1, "a chunk of one token"
        self._compute(row, tokens, start)
        return self._logits(row, start + len(tokens))

    def extend(self, row: int, tokens: Sequence[int], start: int) -> None:
        assert len(tokens) > 1 or self.grain > 1, "a chunk of one token"
        self._compute(row, tokens, start)

    def prefill_together(self, first: int, prompts: Sequence[Sequence[int]]) -> Logits:
        self.calls.append((tuple(range(first, first + len(prompts))), tuple(map(len, prompts)), 0))
        for place, tokens in enumerate(prompts):
            # All of it is a prefill, also a prompt of one token, which alone would not be.
            self._write(first + place, tokens, 0, PREFILL)
        rows = range(first, first + len(prompts))
        return np.stack([self._logits(r, len(p)) for r, p in zip(rows, prompts, strict=True)])

    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> Logits:
        self.steps += 1
        fed = zip(np.asarray(tokens).tolist(), np.asarray(lengths).tolist(), strict=True)
        rows = []
        for slot, (token, length) in enumerate(fed):
            assert slot < self.slots
            self._write(slot, [token], length, DECODE)
            rows.append(self._logits(slot, length + 1))
        assert int((self.memory[: self.slots] >= 0).sum()) <= self.capacity
        return np.stack(rows)

    def copy(self, source: int, target: int, length: int) -> None:
        assert (self.kv[source, :length] >= 0).all(), "nobody computed that"
        for array in (self.memory, self.kv):
            array[target, :length] = array[source, :length]
            array[target, length:] = -1

    def read(self, row: int, start: int, end: int) -> FakeBlock:
        assert (self.kv[row, start:end] >= 0).all() and end > start, "nobody computed that"
        return FakeBlock(start, self.memory[row, start:end].copy(), self.kv[row, start:end].copy())

    def write(self, row: int, start: int, block: FakeBlock) -> None:
        assert start == block.start, "rotated for another position"
        end = start + len(block.tokens)
        self.memory[row, start:end], self.kv[row, start:end] = block.tokens, block.kv

    def trim(self, row: int, length: int) -> None:
        self.memory[row, length:] = self.kv[row, length:] = -1

    def resize(self, slots: int) -> None:
        self.slots = slots
        self._empty()

    def _empty(self) -> None:
        self.memory = np.full((self.slots + self.staging, self.max_length), -1, np.int64)
        self.kv = self.memory.copy()

    def _compute(self, row: int, tokens: Sequence[int], start: int) -> None:
        assert 0 <= row < self.slots + self.staging
        assert start % self.grain == 0, "not where a part may begin"
        self.calls.append(((row,), (len(tokens),), start))
        alone = len(tokens) == 1 and self.grain == 1
        self._write(row, tokens, start, DECODE if alone else PREFILL)

    def _write(self, row: int, tokens: Sequence[int], start: int, path: int) -> None:
        before = int(self.kv[row, start - 1]) if start else 0
        assert before >= 0, "nobody computed what stands before it"
        for position, token in enumerate(tokens, start):
            before = (before * 6364136223846793005 + token * 2 + path + 1442695040888963407) >> 1
            before &= 2**62 - 1
            self.memory[row, position], self.kv[row, position] = token, before

    def _logits(self, row: int, length: int) -> Logits:
        assert (self.kv[row, :length] >= 0).all(), "nobody computed that"
        # Salted so that texts of many kinds come up in the tests of grammars.
        held = self.kv[row, :length].tobytes()
        digest = hashlib.blake2b(held, digest_size=8, salt=b"6").digest()
        generator = np.random.default_rng(int.from_bytes(digest, "little"))
        return (generator.standard_normal(self.vocab_size) * 3).astype(np.float32)
