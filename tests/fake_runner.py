"""A runner without a model: its logits are a hash of the slot's own tokens.

Whatever is fed to the wrong slot, at the wrong position, or lost in a move changes every logit
that follows, so wrong batching shows.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class FakeRunner:
    def __init__(self, vocab_size: int, slots: int = 8, max_length: int = 128) -> None:
        self.vocab_size, self.slots, self.max_length = vocab_size, slots, max_length
        self.memory = np.full((slots, max_length), -1, np.int64)
        self.prefills = 0

    def prefill(self, slot: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        self.prefills += 1
        self.memory[slot, : len(tokens)] = tokens
        return self._logits(slot, len(tokens))

    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> npt.NDArray[np.float32]:
        fed = zip(np.asarray(tokens).tolist(), np.asarray(lengths).tolist(), strict=True)
        rows = []
        for slot, (token, length) in enumerate(fed):
            self.memory[slot, length] = token
            rows.append(self._logits(slot, length + 1))
        return np.stack(rows)

    def copy(self, source: int, target: int, length: int) -> None:
        self.memory[target, :length] = self.memory[source, :length]

    def resize(self, slots: int) -> None:
        self.slots = slots
        self.memory = np.full((slots, self.memory.shape[1]), -1, np.int64)

    def _logits(self, slot: int, length: int) -> npt.NDArray[np.float32]:
        digest = hashlib.blake2b(self.memory[slot, :length].tobytes(), digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "little"))
        return (generator.standard_normal(self.vocab_size) * 3).astype(np.float32)
