"""Finished jobs to scores, outside the engine's and the consumer's threads.

A job of which requests have ended is announced on the orchestrator's queue, at most once a second;
whichever worker takes the message grades it in this thread. Without a broker it is graded here.
Knows nothing of engines or Celery.
"""

import logging
import threading

from orchestrator import lifecycle
from orchestrator.db.database import Database
from orchestrator.errors import PenstockError
from orchestrator.queue import Queue

_INTERVAL_SECONDS = 1.0
_STOP_SECONDS = 10.0

log = logging.getLogger("penstock.grading")


class GradingThread(threading.Thread):
    """Announces and grades until it is stopped; what it leaves undone the reconciler finds."""

    def __init__(self, db: Database, queue: Queue) -> None:
        super().__init__(name="penstock-grading", daemon=True)
        self._db, self._queue = db, queue
        self._lock = threading.Lock()
        self._finished: set[str] = set()
        self._asked: set[str] = set()
        self._nudged, self._stopping = threading.Event(), threading.Event()

    def announce(self, job_id: str) -> None:
        """A request of the job has ended; returns at once."""
        with self._lock:
            self._finished.add(job_id)
        self._nudged.set()

    def grade(self, job_id: str) -> None:
        """Grade the job soon; returns at once."""
        with self._lock:
            self._asked.add(job_id)
        self._nudged.set()

    def stop(self) -> None:
        """End after the job that is being graded; what is announced by then is forgotten."""
        self._stopping.set()
        self._nudged.set()
        if self.is_alive():
            self.join(_STOP_SECONDS)

    def run(self) -> None:
        """Round after round until stopped; never raises."""
        while not self._stopping.is_set():
            self._nudged.wait()
            self._nudged.clear()
            self._round()
            self._stopping.wait(_INTERVAL_SECONDS)

    def _round(self) -> None:
        with self._lock:
            finished, asked = self._finished, self._asked
            self._finished, self._asked = set(), set()
        for job_id in finished - asked:
            if not self._stopping.is_set() and not self._queue.grade(job_id):
                asked.add(job_id)
        for job_id in asked:
            if not self._stopping.is_set():
                self._grade(job_id)

    def _grade(self, job_id: str) -> None:
        try:
            lifecycle.grade(self._db, job_id)
        except PenstockError as error:
            log.warning("grade.failed job=%s error=%s", job_id, error)
        except Exception:
            log.exception("grade.failed job=%s", job_id)
