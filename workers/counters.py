"""One engine's metrics, by its model; knows nothing of who reads them."""

from orchestrator import metrics
from workers.engine.prefilling import Prompted


class Counters:
    """This model's metrics: looked up once, since a step comes a thousand times a second."""

    def __init__(self, model: str) -> None:
        self.claims = metrics.CLAIMS.labels(model)
        self._steps, self._tokens = metrics.STEPS.labels(model), metrics.TOKENS.labels(model)
        self._occupancy = metrics.OCCUPANCY.labels(model)
        self._slots, self._used = metrics.SLOTS.labels(model), metrics.SLOTS_USED.labels(model)
        self._prompts = metrics.PROMPT_TOKENS.labels(model)
        self._cached = metrics.CACHED_TOKENS.labels(model)
        self._evicted = metrics.PREFIXES_EVICTED.labels(model)
        self._held = metrics.PREFIX_BYTES.labels(model)
        self._model, self._counted, self._prompted = model, 0, Prompted(0, 0, 0, 0)

    def failed(self, code: str) -> None:
        metrics.ERRORS.labels(self._model, code).inc()

    def step(self, seated: int, slots: int) -> None:
        self._steps.inc()
        self._occupancy.observe(seated / slots)

    def seats(self, seated: int, slots: int, tokens: int) -> None:
        self._slots.set(slots)
        self._used.set(seated)
        self._tokens.inc(tokens - self._counted)
        self._counted = tokens

    def prompts(self, now: Prompted) -> None:
        before, self._prompted = self._prompted, now
        self._prompts.inc(now.tokens - before.tokens)
        self._cached.inc(now.cached - before.cached)
        self._evicted.inc(now.evicted - before.evicted)
        self._held.set(now.held_bytes)
