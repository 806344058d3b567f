"""The bare engine at a piece of work: completions admitted at once, steps until it is idle.

Its rows of prompts, decode steps and sampling are timed apart. Knows nothing of peers or rounds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loads import Ids
from peer_side import Work
from stopwatch import Stopwatch, busy_cpu_seconds, own_cpu_seconds
from turns import Turn, others_share

from orchestrator.settings import Settings
from workers.drawing.sampler import HostSampler, Sampling
from workers.engine.engine import Choice, Completion, Engine, Tokens
from workers.folders.folder import find_model
from workers.loading.model import LoadedModel

BIAS = -100  # as far down as the API lets a token be pushed
Samplings = Callable[[int], Sampling]


@dataclass
class Ours:
    """One model and one engine, which lives on from turn to turn as a worker's does."""

    model: LoadedModel
    settings: Settings
    engine: Engine
    next_id: int = 0

    @classmethod
    def load(cls, model: str | Path, settings: Settings) -> "Ours":
        loaded = LoadedModel.load(find_model(str(model), settings.models_dir), settings)
        return cls(loaded, settings, _engine(loaded, settings))

    def another(self) -> "Ours":
        """The same model with an engine of its own, which remembers none of the other's prompts."""
        return Ours(self.model, self.settings, _engine(self.model, self.settings))

    @property
    def ids(self) -> Ids:
        return Ids(self.model.tokenizer.vocab_size, tuple(sorted(self.model.eos)))

    def greedy(self, work: Work) -> Turn:
        return self(work, lambda _: Sampling(temperature=0))

    def __call__(self, work: Work, samplings: Samplings) -> Turn:
        """`samplings` gives each request its parameters; forbidden tokens are biased away."""
        bias = tuple((id, float(BIAS)) for id in work.forbidden)
        asked = [replace(samplings(i), logit_bias=bias) for i in range(len(work.prompts))]
        self.engine.seat_only(None, work.rows)
        first, self.next_id = self.next_id, self.next_id + len(asked)
        found = [list[int]() for _ in asked]
        stamps: list[tuple[float, int]] = []
        watch, busy, own = Stopwatch(), busy_cpu_seconds(), own_cpu_seconds()
        with watch.watch(*engine_calls(self.model)):
            began = time.perf_counter()
            for i, (prompt, limit) in enumerate(zip(work.prompts, work.limits, strict=True)):
                choices = (Choice(0),)
                self.engine.admit(Completion(first + i, tuple(prompt), asked[i], choices, limit))
            for tokens in self._steps(found, first):
                stamps.append((time.perf_counter() - began, tokens))
            seconds = time.perf_counter() - began
        others = others_share(busy, own_cpu_seconds() - own, seconds)
        return Turn(seconds, found, others, stamps, watch)

    def _steps(self, found: list[list[int]], first: int) -> Iterator[int]:
        """How many tokens each step had."""
        while not self.engine.idle:
            tokens = [event for event in self.engine.step() if isinstance(event, Tokens)]
            for event in tokens:
                found[event.id - first] += event.tokens
            yield sum(len(event.tokens) for event in tokens)


def _engine(model: LoadedModel, settings: Settings) -> Engine:
    return Engine(
        model.runner,
        model.tokenizer,
        model.eos,
        max_stall=settings.max_stall_ms / 1000,
        prefix_bytes=settings.prefix_cache_mib * 2**20,
    )


def engine_calls(model: LoadedModel) -> Sequence[tuple[str, Any, str]]:
    """What makes up a step: (name, owner, attribute), for a stopwatch."""
    runner: Any = model.runner
    return (
        ("step", Engine, "step"),
        *(("prefill", runner, name) for name in ("prefill", "prefill_together", "extend")),
        ("decode", runner, "decode"),
        *(("copy", runner, name) for name in ("copy", "read", "write")),
        ("sample", HostSampler, "sample"),
    )


@contextmanager
def loaded(model: str | Path, settings: Settings) -> Iterator[Ours]:
    """A model for the block."""
    ours = Ours.load(model, settings)
    try:
        yield ours
    finally:
        ours.engine.close()
        ours.model.runner.close()
