"""What the engine keeps of a completion on its way, and of a choice in a slot; values only.

Knows nothing of runners or of who sits where.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workers.events import Choice, Completion
from workers.sampler import SamplerRow
from workers.tokenizer import TextStream

Logits = npt.NDArray[np.float32]


@dataclass(eq=False, slots=True)
class Admitted:
    """A completion on its way: the choices not yet seated, and the logits they all begin from."""

    completion: Completion
    limit: int
    waiting: deque[Choice]
    prompt_logits: Logits | None = None


@dataclass(eq=False, slots=True)
class Seat:
    """One choice in a slot. `length`: KV positions filled; `last`: the token to feed next.

    `fresh`: the tokens that were sampled here, after the persisted ones.
    """

    admitted: Admitted
    choice: Choice
    row: SamplerRow
    stream: TextStream
    length: int
    last: int = -1
    finished: bool = field(default=False)
    fresh: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.choice.tokens, *self.fresh)

    @property
    def replaying(self) -> bool:
        return self.row.position < len(self.choice.tokens)
