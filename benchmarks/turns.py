"""Systems that take turns at the same work, round after round, and what is made of their times.

A change of the machine's mood meets all of them; ratios are made within a round. Knows nothing of
what the systems are.
"""

import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peer_side import Work
from stopwatch import Stopwatch, busy_cpu_seconds, busy_share

WARM_UP_TOKENS = 4
TRIES = 50


@dataclass(frozen=True, slots=True)
class Turn:
    """What one system did with one piece of work.

    `stamps`: seconds since the work began and how many tokens came then. `others`: the share of the
    processors that went to somebody else.
    """

    seconds: float
    tokens: list[list[int]]
    others: float
    stamps: list[tuple[float, int]] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def rate(self) -> float:
        """New tokens a second, prompts included in the time."""
        return sum(map(len, self.tokens)) / self.seconds

    def decode_rate(self, rows: int) -> float:
        """New tokens a second of the longest run of steps with a token for each of `rows` rows.

        While prompts are still computed, a step may have as many by chance.
        """
        full, longest = list[float](), list[float]()
        for at, tokens in self.stamps:
            full = [*full, at] if tokens == rows else []
            longest = max(longest, full, key=len)
        if len(longest) < 2:
            return float("nan")
        return rows * (len(longest) - 1) / (longest[-1] - longest[0])

    def prompt_rate(self, prompt_tokens: int, rows: int) -> float:
        """Prompt tokens a second until the first step with all rows in it."""
        first = next((at for at, tokens in self.stamps if tokens == rows), float("nan"))
        return prompt_tokens / first


System = Callable[[Work], Turn]


def others_share(busy_before: float | None, own: float, elapsed: float) -> float:
    """Of all processors, since `busy_cpu_seconds` said `busy_before`; NaN where nobody can tell."""
    busy = busy_cpu_seconds()
    if busy is None or busy_before is None:
        return float("nan")
    share = (busy - busy_before - own) / (elapsed * (os.cpu_count() or 1))
    return min(1.0, max(0.0, share))  # the kernel counts in hundredths of a second


def take_turns(
    systems: Mapping[str, System], works: Sequence[Work], others: float, *, warm: Work
) -> list[dict[str, Turn]]:
    """One round for each of `works`, after an unmeasured turn of a few tokens for each system.

    No two of `works` and `warm` have a prompt in common: some systems remember prompts.
    """
    for name, system in systems.items():
        system(warm_up(warm))
        print(f"{name} is warm", file=sys.stderr)
    found = []
    for number, work in enumerate(works, 1):
        turn = {name: undisturbed(system, work, others) for name, system in systems.items()}
        said = ", ".join(f"{name} {each.seconds:.2f} s" for name, each in turn.items())
        print(f"round {number}: {said}", file=sys.stderr)
        found.append(turn)
    return found


def warm_up(work: Work) -> Work:
    few = [min(limit, WARM_UP_TOKENS) for limit in work.limits[: work.rows]]
    return replace(work, prompts=work.prompts[: work.rows], limits=few)


def undisturbed(system: System, work: Work, others: float) -> Turn:
    """A turn in which other processes took no more than the share `others` of the processors.

    One with more is left out whatever its figures, and taken again once the machine is quiet.
    """
    for _ in range(TRIES):
        while others < 1 and busy_share() > others:
            pass
        turn = system(work)
        counts = [len(tokens) for tokens in turn.tokens]
        assert counts == work.limits, f"{counts} new tokens, not {work.limits}"
        if not turn.others > others:
            return turn
        said = f"{turn.seconds:.2f} s, others took {turn.others:.0%}"
        print(f"left out, disturbed: {said}", file=sys.stderr)
    raise SystemExit(f"{TRIES} turns on end were disturbed: the machine is too busy to measure")


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over all rounds; `best` is that of the fastest turn, or of two of them."""

    median: float
    least: float
    most: float
    best: float

    @classmethod
    def of(cls, values: Sequence[float], best: float) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), best)


def rates(rounds: Sequence[Mapping[str, Turn]], rate: Callable[[Turn], float]) -> dict[str, Spread]:
    """By system."""
    by_name = {name: [rate(each[name]) for each in rounds] for name in rounds[0]}
    return {name: Spread.of(values, max(values)) for name, values in by_name.items()}


def ratio(
    rounds: Sequence[Mapping[str, Turn]], upper: str, lower: str, rate: Callable[[Turn], float]
) -> Spread:
    """How many times as fast `upper` is, within rounds, and the fastest turns of both."""
    pairs = [(rate(each[upper]), rate(each[lower])) for each in rounds]
    best = max(one for one, _ in pairs) / max(other for _, other in pairs)
    return Spread.of([one / other for one, other in pairs], best)


def agreement(mine: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Requests with equal tokens; tokens before the first difference, over all requests."""
    same = sum(list(a) == list(b) for a, b in zip(mine, other, strict=True))
    return same, sum(common(a, b) for a, b in zip(mine, other, strict=True))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(one))
