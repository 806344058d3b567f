"""How this machine runs this model best: threads, spinning, rows of a step, tokens of a chunk.

Timed once on the model's first layers (excerpt.py), in about three seconds, and kept in the cache
folder for the machine, the runtime and the graph. The number of threads is part of the fingerprint
of a completion, so the plain choice (a thread a core, spinning) stands unless another is better by
more than the noise, and what was chosen once is kept until it is asked for anew.

Knows nothing of memory: what the device has room for is another question (sizing).
"""

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx

from workers.folders.files import write_whole
from workers.folders.folder import ModelFolder
from workers.measuring.costs import step_costs
from workers.measuring.excerpt import Excerpt, first_layers
from workers.measuring.trial import OpenSession, Trial
from workers.running.machine import Machine, Others, this_machine

log = logging.getLogger("penstock.calibration")

CALIBRATION_VERSION = 1
DEFAULT_SLOTS, DEFAULT_CHUNK = 32, 64
SMALL_BYTES = 32 << 20
"""Weights of a model whose step takes less than about 2 ms: there is nothing to be gained."""
BETTER = 1.05
BUSY = 0.25
"""Where others use more of the processors, who are here now and not later, nothing is chosen."""

_EXCERPT_BYTES = 64 << 20
_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_PROMPTS = (16, 32, 64, 128, 256)
_PAST = 128  # tokens that the rows hold
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 9
_SECONDS = {"choice": 0.6, "rows": 0.8, "prompts": 0.5}
_ENOUGH = 0.92  # of the best rate


@dataclass(frozen=True, slots=True)
class Calibration:
    """What to run a model with; `slots` is not limited by memory."""

    threads: int
    spinning: bool
    slots: int
    chunk: int
    source: str
    """measured; kept: measured before; busy: others used the machine then, and the default was
    kept; default: not worth it, or not possible."""


def calibrate(
    folder: ModelFolder,
    graph: Path,
    open_session: OpenSession,
    *,
    device: str = "cpu",
    cache_dir: Path,
    threads: int = 0,
    slots: int = 0,
    renew: bool = False,
) -> Calibration:
    """The kept calibration of the prepared `graph`, or a new one; `renew` measures anyway.

    `threads` and `slots` that are not 0 come back as they are; where both are given nothing is
    measured. Never raises for a graph that cannot be cut or a cache that cannot be written: then it
    is the default, since a choice that cannot be kept would differ from start to start.
    """
    machine = this_machine()
    plain = Calibration(
        threads or machine.threads, True, slots or DEFAULT_SLOTS, DEFAULT_CHUNK, "default"
    )
    if (threads and slots and not renew) or device != "cpu":
        return plain
    file = cache_dir / "calibration" / f"{_key(machine, graph, threads)}.json"
    kept = None if renew else _read(file)
    if kept is None:
        kept = _measured(folder, graph, open_session, machine, plain, threads)
        kept = kept if kept is None or _write(file, kept) else None
    return plain if kept is None else replace(kept, slots=slots or kept.slots)


# --- measuring ------------------------------------------------------------------------------------


def _measured(
    folder: ModelFolder,
    graph: Path,
    open_session: OpenSession,
    machine: Machine,
    plain: Calibration,
    threads: int,
) -> Calibration | None:
    """None where it is not worth it or not possible; `threads` 0: any number."""
    began = time.perf_counter()
    try:
        model = onnx.load(str(graph), load_external_data=False)
        if step_costs(model.graph).weight_bytes < SMALL_BYTES:
            return None
        excerpt = first_layers(folder, model, _EXCERPT_BYTES)
        if excerpt is None:
            return None
        del model
        bench = _Bench(folder, excerpt, open_session)
        found = _choose(bench, plain, [threads] if threads else _numbers(machine))
    except Exception:  # whatever onnxruntime raises: the model itself may run all the same
        log.warning("calibration.failed model=%s", folder.name, exc_info=True)
        return None
    log.info(
        "calibration.measured model=%s %s seconds=%.1f",
        folder.name,
        found,
        time.perf_counter() - began,
    )
    return found


class _Bench:
    """Sessions of one excerpt, by threads and spinning."""

    def __init__(self, folder: ModelFolder, excerpt: Excerpt, open_session: OpenSession) -> None:
        self._folder, self._excerpt, self._open = folder, excerpt, open_session

    def trial(self, threads: int, spinning: bool) -> Trial:
        session = self._open(self._excerpt.graph, threads, spinning)
        return Trial(
            session, self._excerpt, self._folder, rows=max(_ROWS), past=_PAST, prompt=max(_PROMPTS)
        )


def _numbers(machine: Machine) -> list[int]:
    """Numbers of threads to try, the plain one first: memory is often read as fast by fewer."""
    plain = machine.threads
    return list(dict.fromkeys([plain, machine.cores, max(1, plain // 2), max(1, plain // 4)]))


def _choose(bench: _Bench, plain: Calibration, numbers: Sequence[int]) -> Calibration:
    others = Others()
    best, champion = plain, bench.trial(plain.threads, plain.spinning)
    for threads, spinning in [(numbers[0], False), *((each, True) for each in numbers[1:])]:
        challenger = bench.trial(threads, spinning)
        if is_better(*_duel(champion, challenger)):
            best, champion = replace(best, threads=threads, spinning=spinning), challenger
    rows = _rates(champion.decode, _ROWS, _SECONDS["rows"])
    prompts = _rates(champion.prefill, _PROMPTS, _SECONDS["prompts"])
    if (taken := others.share()) > BUSY:
        said = "the default is kept; `penstock bench MODEL --calibrate` measures anew"
        log.warning("calibration.busy others=%.0f%%: %s", 100 * taken, said)
        return replace(plain, slots=DEFAULT_SLOTS, source="busy")
    return replace(best, slots=enough(rows), chunk=enough(prompts), source="measured")


def _duel(champion: Trial, challenger: Trial) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds by work, of one and the other: they take turns, so that a mood meets both."""
    works: list[Callable[[Trial], float]] = [
        lambda trial: trial.decode(1),
        lambda trial: trial.decode(16),
        lambda trial: trial.prefill(32),
    ]
    for work in works:
        work(champion), work(challenger)  # not counted: memory is touched for the first time
    times: tuple[list[list[float]], list[list[float]]] = ([[] for _ in works], [[] for _ in works])
    deadline = time.perf_counter() + _SECONDS["choice"]
    for round in range(_MOST_ROUNDS):
        if round >= _LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        for each, work in enumerate(works):
            times[0][each].append(work(champion))
            times[1][each].append(work(challenger))
    return times


def is_better(champion: Sequence[Sequence[float]], challenger: Sequence[Sequence[float]]) -> bool:
    """Whether the second is faster over all works by more than 5 %, in medians and in minima."""
    return all(
        statistics.geometric_mean(
            [of(a) / of(b) for a, b in zip(champion, challenger, strict=True)]
        )
        > BETTER
        for of in (statistics.median, min)
    )


def _rates(seconds: Callable[[int], float], sizes: Sequence[int], limit: float) -> dict[int, float]:
    """Items a second by size, each at its fastest of a few rounds.

    A larger size that took less shows that a smaller one was disturbed.
    """
    fastest = dict.fromkeys(sizes, float("inf"))
    deadline = time.perf_counter() + limit
    for round in range(_MOST_ROUNDS):
        if round >= _LEAST_ROUNDS - 1 and time.perf_counter() > deadline:
            break
        for size in sizes:
            fastest[size] = min(fastest[size], seconds(size))
    least = float("inf")
    for size in reversed(sizes):
        least = fastest[size] = min(least, fastest[size])
    return {size: size / fastest[size] for size in sizes}


def enough(rates: dict[int, float]) -> int:
    """The smallest size at which nearly the best rate is reached."""
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= _ENOUGH * best)


# --- keeping --------------------------------------------------------------------------------------


def _key(machine: Machine, graph: Path, threads: int) -> str:
    """Of all that the choice depends on: the speed is the graph's, not its weights' values."""
    with graph.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    facts = (
        CALIBRATION_VERSION,
        machine.cpu,
        machine.cores,
        machine.threads,
        machine.runtime,
        digest,
        threads,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]


def _read(file: Path) -> Calibration | None:
    """What was kept; None if nothing was, or what is there is broken."""
    try:
        values = json.loads(file.read_text())
        source = "busy" if values.get("source") == "busy" else "kept"
        found = Calibration(**{**values, "source": source})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    numbers = (found.threads, found.slots, found.chunk)
    whole = all(type(each) is int and 1 <= each <= 4096 for each in numbers)
    return found if whole and type(found.spinning) is bool else None


def _write(file: Path, found: Calibration) -> bool:
    """Keep it, whole or not at all; False where that cannot be."""
    try:
        write_whole(file, json.dumps(asdict(found)).encode())
    except OSError as error:
        log.warning("calibration.not_kept file=%s: %s; the defaults are taken", file, error)
        return False
    return True
