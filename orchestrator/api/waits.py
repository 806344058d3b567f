"""Waiting for rows to change: whoever waits asks a question, and one look answers all of them.

One thread looks every so often while anybody waits, and there is none while nobody does. A question
is looked at only while somebody waits for its answer, so that a slow reader piles up nothing. Knows
nothing of what is asked, nor of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from orchestrator.errors import WorkerError

PATIENCE_SECONDS = 30.0
"""So long nobody is told that the database is away; then everybody who waits is."""

_IDLE_SECONDS = 5.0
_STOP_SECONDS = 10.0
Question = TypeVar("Question")
Answer = TypeVar("Answer")

log = logging.getLogger("penstock.api")


class Stopped(Exception):
    """Nobody looks any more: the server is stopping."""


@dataclass(eq=False, slots=True)
class _Asked(Generic[Question, Answer]):
    """One who waits: what they ask, and where their answer goes, in which loop."""

    question: Question
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Answer]


class Poller(Generic[Question, Answer]):
    """Looks for all who wait. Thread-safe; `ask` belongs to event loops, any number of them.

    `look`: questions to their answers in the same order; None is no answer yet, an exception is
    raised where it was asked. Called in the poller's thread, about every `every_seconds`, and
    never for more than half of the time.
    """

    def __init__(
        self,
        name: str,
        look: Callable[[Sequence[Question]], Sequence[Answer | Exception | None]],
        every_seconds: float,
    ) -> None:
        self._name, self._look, self._every = name, look, every_seconds
        self._waiting: set[_Asked[Question, Answer]] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def ask(self, question: Question, seconds: float | None = None) -> Answer | None:
        """The answer, once there is one; None when there was none within `seconds`.

        Raises what the look says, WorkerError when the database stays away, Stopped after `close`.
        """
        loop = asyncio.get_running_loop()
        asked: _Asked[Question, Answer] = _Asked(question, loop, loop.create_future())
        self._join(asked)
        try:
            async with asyncio.timeout(seconds):
                return await asked.answer
        except TimeoutError:
            return None
        finally:
            with self._changed:
                self._waiting.discard(asked)

    @property
    def waiting(self) -> int:
        """How many wait for an answer now."""
        with self._changed:
            return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Nobody looks any more."""
        return self._closed

    def close(self) -> None:
        """Tell all who wait that nobody looks any more, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left, thread = list(self._waiting), self._thread
        for asked in left:
            self._tell(asked, Stopped())
        if thread is not None:
            thread.join(_STOP_SECONDS)

    def _join(self, asked: _Asked[Question, Answer]) -> None:
        with self._changed:
            if self._closed:
                raise Stopped
            self._waiting.add(asked)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        failing_since: float | None = None
        while (asked := self._next()) is not None:
            began = time.monotonic()
            try:
                answers = self._look([each.question for each in asked])
                failing_since = None
            except Exception as error:  # whatever it is: who waits is told, the thread goes on
                failing_since = failing_since or began
                answers = self._failed(error, began - failing_since, len(asked))
            for each, answer in zip(asked, answers, strict=True):
                if answer is not None:
                    self._tell(each, answer)
            self._pause(max(self._every, time.monotonic() - began))

    def _next(self) -> list[_Asked[Question, Answer]] | None:
        """All who wait, once somebody does; None when the thread is to end."""
        with self._changed:
            wanted = self._changed.wait_for(lambda: self._waiting or self._closed, _IDLE_SECONDS)
            if self._closed or not wanted:
                self._thread = None
                return None
            return list(self._waiting)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _failed(
        self, error: Exception, failing_seconds: float, count: int
    ) -> Sequence[Exception | None]:
        if not isinstance(error, WorkerError):
            log.exception("%s: a look failed", self._name)
        elif failing_seconds < PATIENCE_SECONDS:
            return [None] * count
        return [error] * count

    def _tell(self, asked: _Asked[Question, Answer], answer: Answer | Exception) -> None:
        with self._changed:
            self._waiting.discard(asked)
        try:
            asked.loop.call_soon_threadsafe(_settle, asked.answer, answer)
        except RuntimeError:  # its loop is closed: nobody is there
            return


def _settle(future: asyncio.Future[Answer], answer: Answer | Exception) -> None:
    if future.done():  # they have left
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
