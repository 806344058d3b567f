"""The kinds of work that systems are compared at: prompts of random token ids, and how many new.

Pure: the same seed gives the same work. `SIZES` are those of the tables; smaller ones fit into
minutes. Knows nothing of systems, nor of how long anything takes.
"""

import random
from dataclasses import dataclass

from peer_side import Work

FIRST_TOKEN = 300  # behind the bytes
TEMPERATURES, SEEDS = (0.4, 0.7, 1.0, 1.3), (1, 2, 3, 4)
POINTS = len(TEMPERATURES) * len(SEEDS)
BATCHES = (1, 4, 8, 16)
MIXED_SLOTS = (8, 16)
SHORTEST = 16  # of a mixed load's longest: as 16 of 256


@dataclass(frozen=True, slots=True)
class Size:
    """`prompts` of `length` tokens, of which the first `shared` are common; `new` at most."""

    prompts: int
    length: int
    new: int
    rounds: int
    shared: int = 0


SIZES = {
    "decode": Size(16, 64, 64, 5),
    "mixed": Size(64, 64, 256, 3),
    "sweep": Size(32, 256, 48, 3),
    "fewshot": Size(64, 1100, 16, 3, shared=1024),
    "everything": Size(32, 64, 64, 5),
    "single": Size(1, 64, 64, 5),
}
SHORT = {
    "decode": Size(16, 64, 32, 3),
    "mixed": Size(32, 64, 128, 2),
    "sweep": Size(4, 256, 48, 2),
    "fewshot": Size(16, 1100, 16, 2, shared=1024),
    "everything": Size(32, 64, 64, 3),
    "single": Size(1, 64, 64, 3),
}
TINY = {kind: Size(2, 12, 8, 1, shared=8 if kind == "fewshot" else 0) for kind in SIZES}


@dataclass(frozen=True, slots=True)
class Ids:
    """Which token ids there are, and which end a text."""

    vocab: int
    forbidden: tuple[int, ...]


def make(kind: str, size: Size, rows: int, ids: Ids, seed: int) -> Work:
    """The work of one round, in `rows` rows at once."""
    source = random.Random(seed)
    beginning = _tokens(size.shared, ids, source)
    count = rows if kind in ("decode", "single") else size.prompts
    prompts = [beginning + _tokens(size.length - size.shared, ids, source) for _ in range(count)]
    if kind == "sweep":
        prompts = [prompt for prompt in prompts for _ in range(POINTS)]
    limits = [size.new] * len(prompts)
    if kind == "mixed":
        least = max(1, size.new // SHORTEST)
        limits = [source.randint(least, size.new) for _ in prompts]
    return Work(prompts, limits, rows, list(ids.forbidden))


def point(request: int) -> tuple[float, int]:
    """Temperature and seed of a request of the sweep."""
    place = request % POINTS
    return TEMPERATURES[place // len(SEEDS)], SEEDS[place % len(SEEDS)]


def _tokens(count: int, ids: Ids, source: random.Random) -> list[int]:
    return [source.randrange(FIRST_TOKEN, ids.vocab - 8) for _ in range(count)]
