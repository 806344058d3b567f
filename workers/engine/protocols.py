"""What the engine asks of a runner and of a sampler: two surfaces, no code.

The real ones are running/runner.py and drawing/sampler.py (and their siblings on a device); in
tests the runner is a hash of what was written into its rows (tests/fake_runner.py).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.errors import RequestError
from workers.drawing.sampler import Sampled, SamplerRow

Logits = npt.NDArray[np.float32]


class Block(Protocol):
    """A row's KV from one position to another: an own copy, to be written at those positions."""

    @property
    def nbytes(self) -> int: ...


class TokenRunner(Protocol):
    """Rows 0..slots-1 are the running batch; prompts are computed in `staging` rows behind.

    `capacity`: tokens that all rows together may hold, at least `max_length`. `grain`: parts of a
    prompt begin at multiples of it, and what they cost is rounded up to one.
    """

    @property
    def slots(self) -> int: ...
    @property
    def staging(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def grain(self) -> int: ...

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> Logits:
        """Compute positions `start`.. of a row; float32 `[vocab]` of the last one (a copy).

        One token only where it is the whole prompt, or `grain` is not 1.
        """

    def extend(self, row: int, tokens: Sequence[int], start: int) -> None:
        """The same, two tokens or more, where nobody asks for the logits."""

    def prefill_together(self, first: int, prompts: Sequence[Sequence[int]]) -> Logits:
        """Whole prompts of two tokens or more into rows `first`..; float32 `[n, vocab]`."""

    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> Any:
        """One token for each of the rows 0..B-1; whatever the sampler of this device takes."""

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one row into another."""

    def read(self, row: int, start: int, end: int) -> Block:
        """A copy of positions `start`..`end`-1 of a row."""

    def write(self, row: int, start: int, block: Any) -> None:
        """What was read from `start` on, into another row."""

    def trim(self, row: int, length: int) -> None:
        """Positions from `length` on are not needed any more."""

    def resize(self, slots: int) -> None:
        """Hold so many slots from now on, all rows empty; raises WorkerError "memory"."""


class TokenSampler(Protocol):
    """`logits`: what `decode` returned, or float32 `[n, vocab]` of prompts."""

    def sample(
        self, logits: Any, indices: Sequence[int], rows: Sequence[SamplerRow]
    ) -> list[Sampled | RequestError]:
        """One token for each of `rows`; `rows[k]` goes with row `indices[k]` of `logits`."""

    def score(self, logits: Any, index: int, row: SamplerRow, token: int) -> Sampled | RequestError:
        """`token` as `sample` would have reported it."""
