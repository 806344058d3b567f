"""The small gradable tasks that `tiny` is trained and evaluated on, generated from a seed.

`stream("train", seed)` and `stream("held_out", seed)` yield samples without end. A sample's key
states its problem (the operands, the word, the whole prompt), and a hash of the key says on which
side of the split it falls, so no held-out problem is in the training stream in any wording.
Pure: knows nothing of tokens, templates or torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from workers.models.tiny.more_turns import follow_up, tools
from workers.models.tiny.one_turn import (
    addition,
    capital,
    chat,
    choose,
    count,
    extract,
    letters,
    repeat,
    reverse,
    sort_digits,
    story,
    subtraction,
    upper,
)
from workers.models.tiny.samples import Message, Sample, draw_word, held_out
from workers.models.tiny.words import SYSTEMS

TASKS: dict[str, Callable[[random.Random], Sample]] = {
    "addition": addition,
    "subtraction": subtraction,
    "reverse": reverse,
    "upper": upper,
    "letters": letters,
    "sort": sort_digits,
    "repeat": repeat,
    "json": extract,
    "capital": capital,
    "tools": tools,
    "follow_up": follow_up,
    "count": count,
    "choose": choose,
    "story": story,
    "chat": chat,
}
EVALUATED = tuple(t for t in TASKS if t not in ("choose", "story", "chat"))
ONE_TURN = tuple(t for t in EVALUATED if t not in ("tools", "follow_up", "count"))
ALWAYS_TRAINED = ("choose", "chat")  # too few prompts to hold any out, and not evaluated


def with_system(sample: Sample, rng: random.Random) -> Sample:
    """Half of the conversations open with a short system message."""
    kind = rng.random()
    if kind < 0.5:
        return sample
    text = rng.choice(SYSTEMS)
    if kind > 0.9:
        text = " ".join(draw_word(rng) for _ in range(rng.randint(2, 6))).capitalize() + "."
    return replace(sample, messages=[{"role": "system", "content": text}, *sample.messages])


def with_history(sample: Sample, rng: random.Random) -> Sample:
    """One conversation in twelve has had one to three other questions before."""
    if rng.random() > 1 / 12:
        return sample
    before: list[Message] = []
    for _ in range(rng.randint(1, 3)):
        earlier = TASKS[rng.choice(ONE_TURN)](rng)
        if not any(held_out(k) for k in earlier.keys):
            answer = {"role": "assistant", "content": earlier.answer}
            before += [*earlier.messages, answer]
    return replace(sample, messages=before + sample.messages)


def stream(side: str, seed: int, shares: dict[str, float] | None = None) -> Iterator[Sample]:
    """Samples of one side of the split ("train" or "held_out"), tasks drawn by their shares.

    Train: none of a sample's problems is held out. Held out: the evaluated problem is, and
    earlier turns may be anything. The same side, seed and shares give the same samples.
    """
    shares = shares or dict.fromkeys(EVALUATED, 1.0)
    rng = random.Random(f"{side} {seed}")  # noqa: S311  (a seed must give the same stream)
    names, weights = list(shares), list(shares.values())
    while True:
        task = rng.choices(names, weights)[0]
        sample = TASKS[task](rng)
        out = task not in ALWAYS_TRAINED and [held_out(k) for k in sample.keys]
        if side == "train" and out and any(out):
            continue
        if side == "held_out" and not (out and out[-1]):
            continue
        yield with_system(with_history(sample, rng), rng)


def evaluation(task: str, number: int, seed: int = 0) -> list[Sample]:
    """`number` different held-out samples of one task (fewer if the task has no more)."""
    samples: dict[str, Sample] = {}
    for tried, sample in enumerate(stream("held_out", seed, {task: 1.0})):
        samples.setdefault(json.dumps([sample.messages, sample.tools]), sample)
        if len(samples) == number or tried > 200 * number:
            return list(samples.values())
    raise AssertionError("a stream has no end")
