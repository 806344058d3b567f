"""How fast a loaded model is on this machine: `penstock bench`.

The engine and the bare runner do the same decode work in turn, so that a change of the machine's
mood meets both; what is reported are medians over rounds, with the least and the most. What a step
must at least take is told from the ceilings: the bytes it has to read, the multiplications it has
to do. Knows the runner and the engine; nothing of jobs, tables or files.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from workers.drawing.sampler import Sampling
from workers.engine.engine import Engine
from workers.engine.events import Choice, Completion, Tokens
from workers.engine.protocols import TokenRunner
from workers.measuring.ceilings import Ceilings
from workers.measuring.costs import Costs

Note = Callable[[str], None]
EngineMaker = Callable[[], Engine]
_LEAST_STEPS, _MOST_STEPS = 8, 96
_ROUNDS = 3
_PREFILL_SHARE = 0.4  # of the time
BANDWIDTH, ARITHMETIC = "bandwidth", "arithmetic"


@dataclass(frozen=True, slots=True)
class Work:
    """What is measured: numbers of rows, lengths of prompts, and seconds for all of it, about."""

    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    seconds: float
    held: int  # tokens that rows hold when their decode steps begin
    every: bool = True  # prompt, however long; otherwise those for which there is time
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Decode:
    """So many rows, each a token a step; `gap`: between two tokens of a row, in milliseconds."""

    rows: int
    steps: int
    tokens_per_second: Spread
    bare_tokens_per_second: Spread
    gap_p50_ms: float
    gap_p99_ms: float
    overhead: float  # of the engine beside the bare runner, as a share of its time
    limit: str | None = None  # bandwidth or arithmetic; None where no ceiling is known
    fraction: float | None = None  # of that ceiling that the bare runner reaches


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt of so many tokens; `first_token`: from admission by an idle engine to its event."""

    tokens: int
    tokens_per_second: Spread
    first_token_ms: Spread
    limit: str | None = None
    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that a call can take by the ceilings."""

    costs: Costs
    ceilings: Ceilings
    kv_bytes_per_token: int

    def of(self, rows: int, width: int, held: int) -> tuple[str, float]:
        """What limits `rows` rows of `width` new tokens each behind `held` ones; the seconds."""
        tokens = rows * width
        inner = self.costs.multiply_adds - self.costs.head_multiply_adds
        adds = tokens * inner + rows * self.costs.head_multiply_adds
        rate = self.ceilings.int4_rate if self.costs.quantized else self.ceilings.fp32_rate
        read = self.costs.weight_bytes + rows * held * self.kv_bytes_per_token
        times = {ARITHMETIC: 2 * adds / rate, BANDWIDTH: read / self.ceilings.read_bandwidth}
        return max(times.items(), key=lambda each: each[1])

    def decode(self, measured: Decode, held: int) -> Decode:
        """With what limits it; its rows held so many tokens when counting began."""
        halfway = held + measured.steps // (2 * _ROUNDS)
        limit, least = self.of(measured.rows, 1, halfway)
        steps = measured.bare_tokens_per_second.median / measured.rows
        return replace(measured, limit=limit, fraction=least * steps)

    def prefill(self, measured: Prefill) -> Prefill:
        """With what limits it."""
        limit, least = self.of(1, measured.tokens, 0)
        prompts = measured.tokens_per_second.median / measured.tokens
        return replace(measured, limit=limit, fraction=least * prompts)


def bench_decode(
    runner: TokenRunner,
    engine: EngineMaker,
    vocab: int,
    work: Work,
    note: Note,
) -> list[Decode]:
    """One `Decode` for each number of rows; at most `runner.slots` of them."""
    source = random.Random(work.seed)  # noqa: S311  token ids, not secrets
    prompt = tuple(source.randrange(vocab) for _ in range(work.held))
    first = {rows: _bare_decode(runner, prompt, rows, 3)[-1] for rows in work.rows}
    seconds = work.seconds * (1 - _PREFILL_SHARE) / (2 * _ROUNDS * len(first))
    steps = {
        rows: max(1, min(max(int(seconds / each), _LEAST_STEPS), _room(runner, rows, work.held)))
        for rows, each in first.items()
    }
    bare: dict[int, list[list[float]]] = {rows: [] for rows in work.rows}
    through: dict[int, list[list[float]]] = {rows: [] for rows in work.rows}
    for round in range(1, _ROUNDS + 1):
        note(f"decode, round {round} of {_ROUNDS}")
        for rows in work.rows:
            bare[rows].append(_bare_decode(runner, prompt, rows, steps[rows]))
            through[rows].append(_engine_decode(engine(), prompt, rows, steps[rows]))
    return [_decode(rows, steps[rows], bare[rows], through[rows]) for rows in work.rows]


def bench_prefill(
    runner: TokenRunner,
    engine: EngineMaker,
    vocab: int,
    work: Work,
    note: Note,
) -> list[Prefill]:
    """One `Prefill` for each length for which there is time, or for every one."""
    source = random.Random(work.seed + 1)  # noqa: S311  token ids, not secrets
    left, cost = work.seconds * _PREFILL_SHARE, 0.0
    found: list[Prefill] = []
    for tokens in work.prompts:
        if found and not work.every and 2 * cost * tokens > left:
            note(f"prompts of {tokens} tokens left out: give more --seconds")
            continue
        began = time.perf_counter()
        bare, first = [], []
        note(f"prompts of {tokens} tokens")
        for round in range(_ROUNDS):
            prompt = tuple(source.randrange(vocab) for _ in range(tokens))
            bare.append(_timed(lambda prompt=prompt: runner.prefill(0, prompt)))  # type: ignore[misc]
            first.append(_first_token(engine(), prompt))
            if round == 0 and 2 * (bare[0] + first[0]) > left:
                break
        found.append(_prefill(tokens, bare, first))
        cost = max(bare) / tokens
        left -= time.perf_counter() - began
    return found


def _room(runner: TokenRunner, rows: int, held: int) -> int:
    """Steps that so many rows can take, within what a row and all rows together may hold."""
    return min(_MOST_STEPS, min(runner.max_length, runner.capacity // rows) - held - 2)


# --- turns ----------------------------------------------------------------------------------------


def _bare_decode(runner: TokenRunner, prompt: Sequence[int], rows: int, steps: int) -> list[float]:
    """Seconds of each step, of rows that all hold the prompt."""
    runner.prefill(0, prompt)
    for row in range(1, rows):
        runner.copy(0, row, len(prompt))
    times = []
    for step in range(steps):
        tokens = [prompt[(row + step) % len(prompt)] for row in range(rows)]
        lengths = [len(prompt) + step] * rows
        began = time.perf_counter()
        runner.decode(tokens, lengths)
        times.append(time.perf_counter() - began)
    for row in reversed(range(rows)):
        runner.trim(row, 0)
    return times


def _engine_decode(engine: Engine, prompt: tuple[int, ...], rows: int, steps: int) -> list[float]:
    """Seconds between the tokens of the rows, one for each step in which all rows sat."""
    choices = tuple(Choice(index) for index in range(rows))
    # The step that seats the rows gives two tokens, and its time is not counted.
    engine.admit(Completion(1, prompt, Sampling(), choices, max_tokens=steps + 2))
    ended = [0.0] * rows
    gaps = []
    while not engine.idle:
        events = engine.step()
        now = time.perf_counter()
        given = [event for event in events if isinstance(event, Tokens) and event.tokens]
        if len(given) == rows and all(ended):
            gaps.append(now - ended[0])
        for event in given:
            ended[event.choice] = now
    return gaps


def _first_token(engine: Engine, prompt: tuple[int, ...]) -> float:
    engine.admit(Completion(1, prompt, Sampling(), (Choice(0),), max_tokens=1))
    began = time.perf_counter()
    while not any(isinstance(event, Tokens) for event in engine.step()):
        pass
    seconds = time.perf_counter() - began
    engine.close()
    return seconds


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- figures --------------------------------------------------------------------------------------


def _decode(
    rows: int,
    steps: int,
    bare: Sequence[Sequence[float]],
    through: Sequence[Sequence[float]],
) -> Decode:
    gaps = sorted(gap for turn in through for gap in turn)
    ratios = [
        statistics.median(mine) / statistics.median(alone)
        for mine, alone in zip(through, bare, strict=True)
    ]
    return Decode(
        rows=rows,
        steps=steps * len(bare),
        tokens_per_second=spread([rows / statistics.median(turn) for turn in through]),
        bare_tokens_per_second=spread([rows / statistics.median(turn) for turn in bare]),
        gap_p50_ms=1e3 * statistics.median(gaps),
        gap_p99_ms=1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        overhead=statistics.median(ratios) - 1,
    )


def _prefill(tokens: int, bare: Sequence[float], first: Sequence[float]) -> Prefill:
    return Prefill(
        tokens=tokens,
        tokens_per_second=spread([tokens / each for each in bare]),
        first_token_ms=spread([1e3 * each for each in first]),
    )


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most of the rounds."""
    return Spread(statistics.median(values), min(values), max(values))
