"""A model in memory: folder, runner, wording, and the fingerprint of their sum.

Knows nothing of jobs, threads or Celery.
"""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import WorkerError
from orchestrator.settings import Settings
from workers.drawing.sampler import SAMPLER_VERSION
from workers.folders.digests import Digests
from workers.folders.folder import ModelFolder
from workers.folders.prepare import prepare
from workers.grammars.matching import GRAMMAR_VERSION
from workers.loading.wording import Wording
from workers.measuring.calibration import Calibration, calibrate
from workers.running.memory import free_bytes
from workers.running.runner import RUNTIME_VERSION, Runner, open_session
from workers.running.sizing import (
    DEVICE_SLOTS,
    LEAST_TOKENS,
    SLOTS,
    STAGING,
    Sizing,
    Wishes,
    on_device,
    on_host,
    weights_bytes,
)
from workers.words.chat import ChatTemplate
from workers.words.tokenizer import Tokenizer

log = logging.getLogger("penstock.model")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What turns messages into prompts and prompts into logits."""

    folder: ModelFolder
    runner: Runner
    wording: Wording
    fingerprint: str
    sizing: Sizing
    calibration: Calibration

    @property
    def tokenizer(self) -> Tokenizer:
        return self.wording.tokenizer

    @property
    def template(self) -> ChatTemplate:
        return self.wording.template

    @property
    def eos(self) -> frozenset[int]:
        """The ids that end a completion."""
        return self.wording.eos

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        settings: Settings,
        *,
        slots: int | None = None,
        device: str = "cpu",
        renew: bool = False,
        alone: bool = True,
    ) -> "LoadedModel":
        """Open the session and what stands beside it; raises WorkerError with the reason.

        `slots` goes before the settings'; 0 or none in both: as many as pay and fit. `renew`: the
        calibration is made anew. `alone`: no other model computes in this process; the threads of
        several sleep while they wait, since spinning they take the processors from each other.
        Rows are sized when the weights are in memory; where the device has no memory for them
        after all, half as many are tried.
        """
        settings = replace(settings, slots=slots or settings.slots)
        wording = Wording.load(folder.path, template_seconds=settings.template_seconds)
        context = min(settings.max_context, folder.context_length)
        graph = prepare(folder.path, settings.cache_dir, context=context)
        calibration = _calibrate(folder, graph, settings, device, renew)
        calibration = replace(calibration, spinning=calibration.spinning and alone)
        free = free_bytes() - weights_bytes(folder)
        runner = Runner(
            folder.path,
            slots=1,
            max_length=min(LEAST_TOKENS, context),
            device=device,
            threads=calibration.threads,
            spinning=calibration.spinning,
            deterministic=settings.deterministic,
            graph=graph,
        )
        sizing = _allot(folder, runner, _size(runner, settings, calibration, free))
        fingerprint = _fingerprint(folder, runner, settings.cache_dir)
        return cls(folder, runner, wording, fingerprint, sizing, calibration)


def _calibrate(
    folder: ModelFolder, graph: Path, settings: Settings, device: str, renew: bool
) -> Calibration:
    def opened(graph: bytes, threads: int, spinning: bool) -> Any:
        return open_session(graph, threads=threads, spinning=spinning, weights=folder.graph.parent)

    return calibrate(
        folder,
        graph,
        opened,
        device=device,
        cache_dir=settings.cache_dir,
        threads=settings.threads,
        slots=settings.slots,
        renew=renew,
    )


def _size(runner: Runner, settings: Settings, calibration: Calibration, free: int) -> Sizing:
    """Rows for what is free now that the weights are in memory.

    `free` is what was free before, less the weights: the system counts files that it has mapped
    among what is available.
    """
    on_cpu, measured = runner.device == "cpu", calibration.source != "default"
    wishes = Wishes.of(
        settings,
        runner.folder.context_length,
        most=calibration.slots if measured else SLOTS if on_cpu else DEVICE_SLOTS,
        staging=STAGING if on_cpu else 1,
        grain=runner.grain,
    )
    now = runner.place.free_bytes()
    per_token, per_row = runner.kv_bytes_per_token, 2 * 4 * runner.vocab_size
    if on_cpu:
        return on_host(wishes, free=min(free, now), per_token=per_token, per_row=per_row)
    return on_device(wishes, free=now, per_token=per_token, per_row=per_row)


def _allot(folder: ModelFolder, runner: Runner, sizing: Sizing) -> Sizing:
    while True:
        try:
            runner.allot(sizing)
            return sizing
        except WorkerError as error:
            if error.code != "memory" or sizing.slots == 1:
                raise
            half = sizing.slots // 2
            log.warning("slots.halved model=%s slots=%s: %s", folder.name, half, error)
            capacity = min(sizing.capacity, half * sizing.max_length)
            sizing = replace(sizing, slots=half, capacity=capacity)


def _fingerprint(folder: ModelFolder, runner: Runner, cache: Path) -> str:
    """Everything that may change a token: the reference, section 2.5.

    Where a row's numbers may depend on the rows beside it, it says so.
    """
    facts = (
        folder.digest(Digests(cache)),
        runner.graph.name,
        SAMPLER_VERSION,
        GRAMMAR_VERSION,
        RUNTIME_VERSION,
        runner.device,
        runner.place.line,
        runner.threads,
        # There a step is computed in the shape of the whole batch.
        (runner.slots, runner.max_length) if runner.grain > 1 else (),
    )
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
    return f"fp_{digest}" if runner.place.invariant else f"fp_{digest}-varies"
