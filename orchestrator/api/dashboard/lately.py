"""What was costly to read, told again for a while: ten times as long as reading it took.

So that any number of open pages of a big job cost a tenth of one processor at most. Knows nothing
of what is read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

TIMES = 10
_MOST = 64
What = TypeVar("What")


@dataclass(slots=True)
class _Read(Generic[What]):
    lock: threading.Lock = field(default_factory=threading.Lock)
    until: float = 0.0
    what: What | None = None


class Lately(Generic[What]):
    """By key, of the `_MOST` asked for last. Thread-safe: of many who ask at once one reads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._reads: dict[str, _Read[What]] = {}

    def tell(self, key: str, read: Callable[[], What]) -> What:
        """What `read` gives, or gave a while ago. What it raises is raised, and not kept."""
        with self._lock:
            found = self._reads.pop(key) if key in self._reads else _Read[What]()
            self._reads[key] = found
            while len(self._reads) > _MOST:
                del self._reads[next(iter(self._reads))]
        with found.lock:
            began = self._now()
            if found.what is None or began >= found.until:
                found.what = read()
                ended = self._now()
                found.until = ended + TIMES * (ended - began)
            return found.what
