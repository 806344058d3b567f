"""Faults from inside a process: what `arm` finds in the environment, it puts into this process.

Only the launcher of these tests calls it; the product holds no line of it.

    FAULT_AT=commit.after:3       kill -9 of itself the third time that point is passed
    FAULT_STEP_SECONDS=0.01       every step of the engine takes that much longer
    FAULT_RECONCILE_SECONDS=0.5   so often it looks for dead leases: they are short in these tests
    FAULT_POISON=segfault:2,5     the requests with these ids do that when they are seated
    FAULT_CLOCK=now               the wall clock is off by the seconds that stand in this file
    FAULT_BROKER=7                every nudge is lost, sent late, twice or behind a later one
"""

import ctypes
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy.engine.default import DefaultDialect

from orchestrator.db import flushes, store
from orchestrator.queue import Queue
from orchestrator.reconciler import ReconcilerThread
from workers import recorder
from workers.engine import engine as engines
from workers.engine import events

WORKER_POINTS = tuple(
    f"{step}.{when}"
    for step in ("claim", "insert", "commit", "finish")
    for when in ("before", "after")
)
SUBMITTER_POINTS = ("wake.before", "wake.after")
POISONS = ("exception", "SystemExit", "segfault", "endless", "nan")


def arm(environ: Mapping[str, str]) -> None:
    """Patch this process as the environment says; nothing without the variables."""
    if at := environ.get("FAULT_AT"):
        name, _, count = at.partition(":")
        _arm_point(name, int(count or 1))
    if seconds := environ.get("FAULT_STEP_SECONDS"):
        _arm_slowness(float(seconds))
    if seconds := environ.get("FAULT_RECONCILE_SECONDS"):
        ReconcilerThread.__init__.__kwdefaults__["interval_seconds"] = float(seconds)
    if poison := environ.get("FAULT_POISON"):
        kind, _, ids = poison.partition(":")
        _arm_poison(kind, frozenset(map(int, ids.split(","))))
    if file := environ.get("FAULT_CLOCK"):
        _arm_clock(Path(file))
    if seed := environ.get("FAULT_BROKER"):
        disturb_nudges(random.Random(f"{seed} {os.getpid()}"))


def disturb_nudges(rng: random.Random) -> Callable[[], None]:
    """Lose, delay, double and reorder every nudge of this process; returns what undoes it."""
    publish = Queue._publish
    timers: list[threading.Timer] = []

    def later(*nudge: Any) -> bool:
        timers[:] = [timer for timer in timers if timer.is_alive()]
        for _ in range(rng.choice((0, 1, 2, 2))):
            timers.append(threading.Timer(rng.uniform(0, 0.5), publish, nudge))
            timers[-1].daemon = True
            timers[-1].start()
        return True

    Queue._publish = later  # type: ignore[method-assign]

    def undo() -> None:
        Queue._publish = publish  # type: ignore[method-assign]
        for timer in timers:
            timer.cancel()
            timer.join()

    return undo


def _arm_point(name: str, count: int) -> None:
    left = [count]

    def passed() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    step, _, when = name.partition(".")
    _POINTS[step](passed if when == "before" else _nothing, passed if when == "after" else _nothing)


def _nothing() -> None:
    pass


def _arm_claim(before: Callable[[], None], after: Callable[[], None]) -> None:
    claim = store.claim

    def patched(*args: Any, **kwargs: Any) -> list[store.Claimed]:
        before()
        claims = claim(*args, **kwargs)
        if claims:
            after()
        return claims

    store.claim = patched


def _arm_insert(before: Callable[[], None], after: Callable[[], None]) -> None:
    """Inside a flush's transaction that writes something: before its rows, or after them."""
    write = flushes._write

    def patched(tx: Any, parts: Sequence[Any], *rest: Any) -> None:
        if any(part.chunks or part.ends for part in parts):
            before()
        write(tx, parts, *rest)
        if any(part.chunks or part.ends for part in parts):
            after()

    flushes._write = patched


def _arm_commit(before: Callable[[], None], after: Callable[[], None]) -> None:
    commit = DefaultDialect.do_commit

    def patched(self: DefaultDialect, connection: Any) -> None:
        before()
        commit(self, connection)
        after()

    DefaultDialect.do_commit = patched  # type: ignore[method-assign]


def _arm_finish(before: Callable[[], None], after: Callable[[], None]) -> None:
    flush = store.flush

    def patched(db: Any, writes: Sequence[store.RequestWrite], **kwargs: Any) -> store.Flushed:
        ends = any(write.outcome for write in writes)
        if ends:
            before()
        flushed = flush(db, writes, **kwargs)
        if ends:
            after()
        return flushed

    store.flush = patched
    assert recorder.store is store


def _arm_wake(before: Callable[[], None], after: Callable[[], None]) -> None:
    wake = Queue.wake

    def patched(self: Queue, model: str) -> bool:
        before()
        sent = wake(self, model)
        after()
        return sent

    Queue.wake = patched  # type: ignore[method-assign]


_POINTS = {
    "claim": _arm_claim,
    "insert": _arm_insert,
    "commit": _arm_commit,
    "finish": _arm_finish,
    "wake": _arm_wake,
}


def _arm_clock(file: Path) -> None:
    """Whatever Python code reads of the wall clock, where `clock.c` cannot be compiled."""
    now, now_ns = time.time, time.time_ns

    def stepped() -> float:
        return now() + float(file.read_text() or 0)

    def stepped_ns() -> int:
        return now_ns() + int(file.read_text() or 0) * 10**9

    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            if value is now:
                setattr(module, name, stepped)
            elif value is now_ns:
                setattr(module, name, stepped_ns)


def _arm_slowness(seconds: float) -> None:
    step = engines.Engine.step

    def patched(self: engines.Engine) -> list[events.Event]:
        time.sleep(seconds)
        return step(self)

    engines.Engine.step = patched  # type: ignore[method-assign]


def _arm_poison(kind: str, ids: frozenset[int]) -> None:
    seat = engines.Engine._seat

    def patched(self: engines.Engine, admitted: Any, computed: Any) -> Any:
        if admitted.completion.id not in ids:
            return seat(self, admitted, computed)
        match kind:
            case "exception":
                raise RuntimeError("poisoned by the test")
            case "SystemExit":
                raise SystemExit(3)
            case "segfault":
                ctypes.string_at(0)
            case "endless":
                while True:
                    pass
        seated, computed = seat(self, admitted, computed)
        return seated, replace(computed, logits=np.full_like(computed.logits, np.nan))

    engines.Engine._seat = patched  # type: ignore[method-assign]
