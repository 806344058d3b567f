"""What one engine is doing, as a value for other threads; knows no claims nor databases."""

import time
from collections import deque
from dataclasses import dataclass

from workers.counters import Counters
from workers.engine.engine import Engine

_RATE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class EngineState:
    """What one engine is doing; `claims`: requests it holds, `tokens`: its own since its start.

    `prompt_tokens`: of the prompts begun; `cached_tokens`: those of them that were not computed;
    `prefix_bytes`: what the cache of prompts holds.
    """

    worker_id: str
    model: str
    device: str
    slots: int
    slots_used: int
    claims: int
    tokens: int
    tokens_per_second: float
    prompt_tokens: int
    cached_tokens: int
    prefix_bytes: int


class Observer:
    """Looks at one engine for its thread, and counts for Prometheus what it sees."""

    def __init__(
        self, engine: Engine, counters: Counters, worker_id: str, model: str, device: str
    ) -> None:
        self._engine, self._counters = engine, counters
        self._worker_id, self._model, self._device = worker_id, model, device
        self._rate: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def state(self, claims: int, tokens: int) -> EngineState:
        """The engine now, with so many requests and so many new tokens since its start."""
        engine, now, prompted = self._engine, time.monotonic(), self._engine.prompted
        self._rate.append((now, tokens))
        while len(self._rate) > 2 and self._rate[0][0] < now - _RATE_SECONDS:
            self._rate.popleft()
        since, before = self._rate[0]
        self._counters.seats(engine.seated, engine.slots, tokens)
        self._counters.prompts(prompted)
        return EngineState(
            worker_id=self._worker_id,
            model=self._model,
            device=self._device,
            slots=engine.slots,
            slots_used=engine.seated,
            claims=claims,
            tokens=tokens,
            tokens_per_second=(tokens - before) / max(now - since, 1e-3),
            prompt_tokens=prompted.tokens,
            cached_tokens=prompted.cached,
            prefix_bytes=prompted.held_bytes,
        )
