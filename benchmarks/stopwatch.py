"""Where a run's time goes: watched calls, counted and timed, and what other processes took.

Knows nothing of what it watches. Calls that contain watched calls are counted whole.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

_STAT = Path("/proc/stat")


@dataclass(slots=True)
class Stopwatch:
    """Seconds and calls by name, and when (`time.perf_counter`) the last call of a name ended."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, began: float) -> None:
        ended = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + ended - began
        self.calls[name] = self.calls.get(name, 0) + 1
        self.ended[name] = ended

    @contextmanager
    def watch(self, *targets: tuple[str, Any, str]) -> Iterator[None]:
        """Time every call of `attribute` of `owner`, for each (name, owner, attribute)."""
        with ExitStack() as stack:
            for name, owner, attribute in targets:
                timed = self._timed(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            yield

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.note(name, began)

        return timed


def own_cpu_seconds() -> float:
    """Processor seconds of this process so far."""
    return time.process_time()


def busy_cpu_seconds() -> float | None:
    """Processor seconds that all processes (and the host) took from this machine; Linux only."""
    if not _STAT.is_file():
        return None
    fields = [int(value) for value in _STAT.read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]  # idle and iowait, proc(5)
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def busy_share(seconds: float = 1.0) -> float:
    """The share of the processors in use over the next `seconds`; 0 where it cannot be told."""
    before = busy_cpu_seconds()
    time.sleep(seconds)
    after = busy_cpu_seconds()
    if before is None or after is None:
        return 0.0
    return (after - before) / (seconds * (os.cpu_count() or 1))
