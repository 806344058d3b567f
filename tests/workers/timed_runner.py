"""A fake runner whose calls take time on a clock that stands still otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy.typing as npt

from tests.fake_runner import FakeRunner, Logits


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Costs:
    """Seconds of a prefill call, of each prompt token, of a decode call, of each of its rows."""

    call: float = 0.0
    token: float = 0.001
    step: float = 0.0
    row: float = 0.0


class TimedRunner(FakeRunner):
    def __init__(
        self, vocab_size: int, clock: Clock, costs: Costs, slots: int = 8, **shape: int
    ) -> None:
        super().__init__(vocab_size, slots, **shape)
        self.clock, self.costs = clock, costs

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> Logits:
        self._spend(len(tokens))
        return super().prefill(row, tokens, start)

    def extend(self, row: int, tokens: Sequence[int], start: int) -> None:
        self._spend(len(tokens))
        super().extend(row, tokens, start)

    def prefill_together(self, first: int, prompts: Sequence[Sequence[int]]) -> Logits:
        self._spend(len(prompts) * max(map(len, prompts)))
        return super().prefill_together(first, prompts)

    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> Logits:
        logits = super().decode(tokens, lengths)
        self.clock.now += self.costs.step + self.costs.row * len(logits)
        return logits

    def _spend(self, tokens: int) -> None:
        self.clock.now += self.costs.call + self.costs.token * tokens
