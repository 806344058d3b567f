"""The peer's side of peers.py: one JSON object a line, work on stdin, what came of it on stdout.

Knows nothing of any library, nor of Penstock: token ids in, token ids and times out.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version


@dataclass(frozen=True)
class Work:
    """`limits[i]` new tokens for `prompts[i]`, in at most `rows` rows at once, all greedy.

    `forbidden` tokens, those that would end a text early, are never chosen.
    """

    prompts: list[list[int]]
    limits: list[int]
    rows: int
    forbidden: list[int]


@dataclass
class Stamps:
    """When new tokens came: seconds since the work began, and how many at once."""

    began: float = field(default_factory=time.perf_counter)
    found: list[tuple[float, int]] = field(default_factory=list)

    def __call__(self, tokens: int) -> None:
        self.found.append((time.perf_counter() - self.began, tokens))


Mode = Callable[[Work, Stamps], list[list[int]]]


def serve(packages: tuple[str, ...], load: Callable[[], Mapping[str, Mode]]) -> None:
    """Load, say the versions, and answer until the work ends: {"mode", "work"} a line."""
    # What the library may print to stdout must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    modes = load()
    versions = {name: version(name) for name in packages}
    print(json.dumps({"versions": versions, "modes": list(modes)}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        reply = answer(modes[command["mode"]], Work(**command["work"]))
        print(json.dumps(reply), file=answers, flush=True)


def answer(mode: Mode, work: Work) -> dict[str, object]:
    """The tokens, the stamps, seconds until the last token, and those of the processor."""
    stamps, cpu_began = Stamps(), time.process_time()
    tokens = mode(work, stamps)
    seconds, cpu = stamps.found[-1][0], time.process_time() - cpu_began
    return {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, "stamps": stamps.found}
