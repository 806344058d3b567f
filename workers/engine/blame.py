"""A step failed: whose fault was it? Tries the batch by halves until one completion stands alone.

The batch is parked and its halves run by themselves, each until every choice has gone beyond the
token at which the step failed; a half that fails is halved again. Who fails alone in one slot is
to blame and leaves: as its own failure when it needs more memory than there is, else as `Broken`,
since it may still be the machine. If no half fails, nobody is to blame: out of memory then means
that there were too many, and the slots are halved, to be doubled again after a quiet while.

What a completion yields does not depend on its neighbours, so its trials change no token.
Knows nothing of requests, claims or SQL.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.errors import RequestError, WorkerError
from workers.engine.engine import Engine
from workers.engine.events import Broken, Event, Failed, Finished, Tokens

MOST_IN_A_ROW = 8
QUIET_SECONDS = 300.0
MOST_QUIET_SECONDS = 3600.0

log = logging.getLogger("penstock.blame")


@dataclass(frozen=True, slots=True)
class _Trial:
    """Completions to be run without any other, in so many slots at most."""

    ids: tuple[int, ...]
    slots: int


class Blame:
    """Steps an engine for its owner, who admits by the engine itself."""

    def __init__(
        self,
        engine: Engine,
        failed: Callable[[str], None] = lambda code: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`failed` is told the code of each step that failed; `clock` tells seconds."""
        self._engine, self._tell, self._clock = engine, failed, clock
        self._trials: list[_Trial] = []  # the last is running
        self._marks: dict[tuple[int, int], int] = {}
        self._full = self._most = engine.slots
        self._short_of_memory = 0
        self._quiet, self._grow_at = QUIET_SECONDS, 0.0
        self._in_a_row = 0

    @property
    def trying(self) -> bool:
        """A trial is running: admit nothing new meanwhile."""
        return bool(self._trials)

    def forget(self) -> None:
        """The engine was closed: nobody is left to be tried."""
        self._trials.clear()
        self._marks.clear()
        self._engine.seat_only(None, self._full)

    def cancel(self, id: int) -> None:
        """Forget a completion; if it was on trial, nobody is to blame, and all go on together."""
        self._engine.cancel(id)
        if any(id in trial.ids for trial in self._trials):
            self._engine.park()
            self._trials.clear()
            self._short_of_memory = 0
            self._next()

    def step(self) -> list[Event]:
        """One step of the engine and whatever follows from its failure.

        Slots that were given up for want of memory are tried again when it is time to.

        Raises WorkerError when MOST_IN_A_ROW completions have failed alone, one after the other,
        and no step has gone well since: then it is the machine.
        """
        if self._full < self._most and not self._trials and self._clock() >= self._grow_at:
            self._grow()
        try:
            events = self._engine.step()
        # SystemExit too: native code and whoever patched it may call exit in this thread.
        except (Exception, SystemExit) as error:
            events = self._engine.drain()
            return [*events, *self._failed(error)]
        self._passed(events)
        return events

    def _passed(self, events: Sequence[Event]) -> None:
        if not self._trials:
            # A chunk of a prompt that went well says nothing of a step.
            if any(isinstance(event, Tokens | Finished) for event in events):
                self._in_a_row = 0
        elif self._beyond(self._trials[-1].ids):
            self._in_a_row = 0
            self._trials.pop()
            self._engine.park()
            self._next()

    def _beyond(self, ids: Sequence[int]) -> bool:
        for (id, choice), mark in self._marks.items():
            position = self._engine.position(id, choice) if id in ids else None
            if position is not None and position <= mark:
                return False
        return True

    def _failed(self, error: BaseException) -> list[Event]:
        ids, rows = self._engine.involved, self._engine.rows
        if not ids:
            raise error
        found = _worker_error(error)
        self._tell(found.code)
        log.warning(
            "step.failed code=%s completions=%s rows=%s: %s", found.code, len(ids), rows, found
        )
        self._marks.update(self._engine.park())
        if self._trials:
            self._trials.pop()
        if found.code == "memory":
            self._short_of_memory = min(self._short_of_memory or rows, rows)
            self._grow_at = self._clock() + self._quiet
            self._engine.forget_prompts()
        if len(ids) == 1 and (rows <= 1 or found.code != "memory"):
            return [self._guilty(ids[0], found)]
        half = len(ids) // 2
        halves = (ids[:half], ids[half:]) if half else (ids,)
        slots = self._full if half else rows // 2
        self._trials += [_Trial(part, slots) for part in reversed(halves)]
        self._next()
        return []

    def _guilty(self, id: int, error: WorkerError) -> Event:
        """One is to blame: the others go on as if nothing had been."""
        self._engine.cancel(id)
        self._trials.clear()
        self._short_of_memory = 0
        self._next()
        if error.code == "memory":
            message = f"The device has not enough memory for this request: {error.message}"
            return Failed(id, RequestError("out_of_memory", message))
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise error
        return Broken(id, error)

    def _next(self) -> None:
        if self._trials:
            self._engine.seat_only(self._trials[-1].ids, self._trials[-1].slots)
            return
        self._marks.clear()
        if self._short_of_memory:
            self._halve(self._short_of_memory)
            self._short_of_memory = 0
        self._engine.seat_only(None, self._full)

    def _halve(self, slots: int) -> None:
        """So many were too many. Each further time it takes twice as long until more are tried."""
        self._full = max(1, slots // 2)
        log.warning("slots.halved slots=%s", self._full)
        self._engine.resize(self._full)
        self._grow_at = self._clock() + self._quiet
        self._quiet = min(2 * self._quiet, MOST_QUIET_SECONDS)

    def _grow(self) -> None:
        """No step ran out of memory for a while: try twice as many. Who is seated is replayed."""
        self._engine.park()
        more = min(2 * self._full, self._most)
        try:
            self._engine.resize(more)
        except WorkerError as error:
            log.warning("slots.refused slots=%s: %s", more, error)
            self._halve(2 * self._full)
        else:
            self._full, self._grow_at = more, self._clock() + self._quiet
            log.warning("slots.doubled slots=%s", more)
        self._engine.seat_only(None, self._full)


def _worker_error(error: BaseException) -> WorkerError:
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, MemoryError):
        return WorkerError("memory", str(error) or "out of memory")
    log.error("step.raised", exc_info=error)
    return WorkerError("step", f"{type(error).__name__}: {error}"[:500])
