"""How long rows that run wait while prompts come in: `python benchmarks/stall.py [--model FOLDER]`.

Some rows generate; meanwhile one prompt after another is admitted, each as the one before has its
only token. What is measured is the time from one token of the running rows to the next, beside the
bound that the engine was given and beside the same rows left alone.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loads import FIRST_TOKEN
from ours import BIAS, loaded
from setting import setting
from systems import HERE

from orchestrator.settings import Settings
from orchestrator.terminal import print_table
from workers.drawing.sampler import Sampling
from workers.engine.engine import Choice, Completion, Engine, Tokens

BOUNDS_MS = (100, 250, 1000)
ROUNDS = 3
ALONE_STEPS = 24
RUNNING, ROOM = 64, 1024  # tokens of a running row: its prompt, and more than it gets to


def seat(engine: Engine, sampling: Sampling, running: Sequence[list[int]]) -> float:
    """Start the rows; seconds of a step of theirs with nothing else to do, the median."""
    for i, prompt in enumerate(running):
        engine.admit(Completion(i, tuple(prompt), sampling, (Choice(0),), ROOM))
    begun: set[int] = set()
    while len(begun) < len(running):
        begun |= {event.id for event in engine.step() if isinstance(event, Tokens)}
    seconds: list[float] = []
    for _ in range(ALONE_STEPS):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def disturb(
    engine: Engine, sampling: Sampling, rows: int, prompts: Sequence[list[int]]
) -> tuple[list[float], float]:
    """Seconds between tokens of the `rows` that run while prompts come in, and seconds in all."""
    found: list[float] = []
    began = last = time.perf_counter()
    for i, prompt in enumerate(prompts, rows):
        engine.admit(Completion(i, tuple(prompt), sampling, (Choice(0),), 1))
        here = False
        while not here:
            told = {event.id for event in engine.step() if isinstance(event, Tokens)}
            here = i in told
            if told & set(range(rows)):
                now = time.perf_counter()
                found.append(now - last)
                last = now
    return found, time.perf_counter() - began


def main() -> int:
    """Print a table; the exit status is 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(HERE / "models" / "qwen2.5-0.5b-w8a8"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="that come in, a round")
    parser.add_argument("--length", type=int, default=1000, help="tokens of each of them")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    source = random.Random(asked.seed)
    own = Settings(
        slots=asked.rows + 2, max_context=max(asked.length, RUNNING) + ROOM, prefix_cache_mib=0
    )
    table: list[list[str]] = []
    steps: list[float] = []
    per_bound: dict[int, list[float]] = {bound: [] for bound in BOUNDS_MS}
    spent = dict.fromkeys(BOUNDS_MS, 0.0)
    for _ in range(asked.rounds):
        for bound in BOUNDS_MS:
            with loaded(Path(asked.model), replace(own, max_stall_ms=bound)) as ours:
                bias = tuple((id, float(BIAS)) for id in ours.ids.forbidden)
                sampling = Sampling(temperature=0, logit_bias=bias)

                def made(count: int, vocab: int = ours.ids.vocab) -> list[int]:
                    return [source.randrange(FIRST_TOKEN, vocab - 8) for _ in range(count)]

                running = [made(RUNNING) for _ in range(asked.rows)]
                steps.append(seat(ours.engine, sampling, running))
                prompts = [made(asked.length) for _ in range(asked.prompts)]
                found, seconds = disturb(ours.engine, sampling, asked.rows, prompts)
                per_bound[bound] += found
                spent[bound] += seconds
    for bound, found in per_bound.items():
        cuts = statistics.quantiles(found, n=100, method="inclusive")
        milliseconds = [1e3 * each for each in (cuts[49], cuts[94], cuts[98], max(found))]
        over = sum(each > bound / 1e3 for each in found) / len(found)
        rate = asked.rounds * asked.prompts * asked.length / spent[bound]
        shown = [f"{each:.0f}" for each in milliseconds]
        table.append([f"{bound} ms", str(len(found)), *shown, f"{over:.1%}", f"{rate:.0f}"])
    for name, value in setting(Path(asked.model).name, os.cpu_count() or 1).items():
        print(f"{name}: {value}")
    print(f"{asked.rows} rows, prompts of {asked.length} tokens, {asked.rounds} rounds")
    print(f"a step alone takes {1e3 * statistics.median(steps):.0f} ms; while prompts come in:")
    print_table(
        ["bound", "steps", "median ms", "p95", "p99", "most", "over it", "prompt tokens/s"],
        table,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
