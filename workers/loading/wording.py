"""How a model reads and writes: tokenizer, chat template, format of calls, grammars.

All of a model but its weights, so that a plan can be checked where no session is open. Knows
nothing of jobs, devices or what a request asks for.
"""

from dataclasses import dataclass
from pathlib import Path

from workers.grammars.constraint import Grammars
from workers.words.calls import CallFormat
from workers.words.chat import ChatTemplate, eos_token_ids
from workers.words.sandbox import LIMITS, Limits
from workers.words.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Wording:
    """One model's; safe to use from several threads. `calls` is None where no format is known."""

    tokenizer: Tokenizer
    template: ChatTemplate
    eos: frozenset[int]
    calls: CallFormat | None
    grammars: Grammars

    @classmethod
    def load(cls, folder: Path, *, template_seconds: float = LIMITS.seconds) -> "Wording":
        """What the model's folder holds; raises WorkerError `model` with what is missing in it.

        `template_seconds`: the processor time that its chat template may take for one prompt.
        """
        tokenizer = Tokenizer(folder)
        template = ChatTemplate.load(folder, Limits(seconds=template_seconds))
        eos = eos_token_ids(folder, tokenizer, template)
        calls = CallFormat.of(folder, template.tool_source or template.source)
        return cls(tokenizer, template, eos, calls, Grammars(tokenizer, eos))
