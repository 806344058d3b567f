"""What a sample is, which side of the split it falls on, and the random words inside it.

Knows nothing of the tasks.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from workers.models.tiny.words import CITIES, NAMES, WORDS

Message = dict[str, Any]
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Sample:
    """One conversation up to the answer, the answer to train on, and every answer that counts.

    `keys` names the problems inside: the last is the one evaluated, the others belong to earlier
    turns.
    """

    task: str
    messages: list[Message]
    answer: str
    keys: tuple[str, ...]
    tools: list[dict[str, Any]] | None = None
    accepted: tuple[str, ...] = field(default=())

    def correct(self, text: str) -> bool:
        return text in (self.accepted or (self.answer,))


def held_out(key: str) -> bool:
    """The split: one problem in twenty, chosen by SHA-256 of its key, is never trained on."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def sample_of(task: str, prompt: str, answer: str, key: str = "", **more: Any) -> Sample:
    messages = [{"role": "user", "content": prompt}]
    return Sample(task, messages, answer, (f"{task}|{key or prompt}",), **more)


def draw_word(rng: random.Random, low: int = 3, high: int = 9) -> str:
    """A word of the list, or letters that can be pronounced, or letters that cannot."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(WORDS)
    length = rng.randint(low, high)
    if kind < 0.75:
        sets = ("bcdfghjklmnprstvwz", "aeiou")
        start = rng.random() < 0.3
        return "".join(rng.choice(sets[(i + start) % 2]) for i in range(length))
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))


def draw_name(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.6 else draw_word(rng, 3, 7).capitalize()


def draw_city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.6 else draw_word(rng, 4, 8).capitalize()


def draw_operand(rng: random.Random) -> int:
    return rng.randint(0, 9) if rng.random() < 0.1 else rng.randint(0, 99)
