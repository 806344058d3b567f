"""A model in memory: folder, runner, wording, and the fingerprint of their sum.

Knows nothing of jobs, threads or Celery.
"""

import hashlib
import logging
from dataclasses import dataclass

from orchestrator.errors import WorkerError
from orchestrator.settings import Settings
from workers.chat import ChatTemplate
from workers.folder import ModelFolder
from workers.matching import GRAMMAR_VERSION
from workers.prepare import PREPARE_VERSION
from workers.runner import RUNTIME_VERSION, Runner
from workers.sampler import SAMPLER_VERSION
from workers.tokenizer import Tokenizer
from workers.wording import Wording

log = logging.getLogger("penstock.model")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What turns messages into prompts and prompts into logits."""

    folder: ModelFolder
    runner: Runner
    wording: Wording
    fingerprint: str

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
    ) -> "LoadedModel":
        """Open the session and what stands beside it; raises WorkerError with the reason.

        Where the device has no memory for so many slots it is tried with half as many.
        """
        wording = Wording.load(folder.path, template_seconds=settings.template_seconds)
        runner = _runner(folder, settings, slots or settings.slots, device)
        return cls(folder, runner, wording, _fingerprint(folder, runner))


def _runner(folder: ModelFolder, settings: Settings, slots: int, device: str) -> Runner:
    while True:
        try:
            return Runner(
                folder.path,
                slots=slots,
                max_length=settings.max_context,
                device=device,
                threads=settings.threads,
                cache=settings.cache_dir,
            )
        except WorkerError as error:
            if error.code != "memory" or slots == 1:
                raise
            log.warning("slots.halved model=%s slots=%s: %s", folder.name, slots // 2, error)
            slots //= 2


def _fingerprint(folder: ModelFolder, runner: Runner) -> str:
    """Everything that may change a token: the reference, section 2.5."""
    facts = (
        folder.digest(),
        PREPARE_VERSION,
        SAMPLER_VERSION,
        GRAMMAR_VERSION,
        RUNTIME_VERSION,
        runner.device,
        runner.threads,
    )
    return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
