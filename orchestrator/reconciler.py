"""What was left behind is taken up again: deadlines, dead leases, lost workers, lost nudges.

Every step is one transition of `db.store` that does nothing when there is nothing to do, so that
any number of reconcilers may run at once, in every worker and scheduler. Knows nothing of devices
or of what is done with a nudge; only the database's clock counts.
"""

import logging
import math
import threading
import time
from dataclasses import asdict, dataclass

from orchestrator import lifecycle
from orchestrator.db import deliveries, leftovers, store, tallies, views
from orchestrator.db.database import Database
from orchestrator.errors import PenstockError
from orchestrator.queue import Queue
from orchestrator.webhooks import Sender

INTERVAL_SECONDS = 5.0
_LEAST_SECONDS = 1.0
_STOP_SECONDS = 10.0

log = logging.getLogger("penstock.reconciler")


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What one look did.

    Jobs cancelled at their deadline, workers forgotten, requests released from dead leases, jobs
    removed that were never whole; models woken, ids of jobs that had ended without being graded.
    """

    cancelled: int = 0
    forgotten: int = 0
    released: int = 0
    removed: int = 0
    woken: tuple[str, ...] = ()
    ungraded: tuple[str, ...] = ()


def reconcile(db: Database, queue: Queue) -> Reconciled:
    """Cancel what is past its deadline, release what died, wake what waits. Idempotent.

    Only models that a live worker serves are woken: nudges that nobody takes would pile up in the
    broker, and a worker that starts looks by itself. Raises WorkerError when the database cannot.
    """
    cancelled = len(store.expire_deadlines(db))
    forgotten = len(store.forget_workers(db))
    released = store.release_expired(db)
    removed = store.remove_unplanned(db)
    served = {worker.model for worker in views.live_workers(db)}
    woken = tuple(model for model in leftovers.waiting_models(db) if model in served)
    for model in woken:
        queue.wake(model)
    found = Reconciled(cancelled, forgotten, released, removed, woken, leftovers.ungraded_jobs(db))
    for job_id in found.ungraded:
        if served:
            queue.grade(job_id)
        else:
            lifecycle.grade(db, job_id)
    leftovers.note_ended(db)
    deliveries.announce(db)
    tallies.fold(db)
    _log(found)
    return found


def _log(found: Reconciled) -> None:
    """A line where something was changed; that work waits is no news."""
    if found.cancelled or found.forgotten or found.released or found.removed:
        facts = " ".join(f"{name}={n}" for name, n in asdict(found).items() if isinstance(n, int))
        log.info("reconciled %s", facts)


def looks_every(lease_seconds: float) -> float:
    """How often to look, in seconds: a lease that ran out waits for half its length at most."""
    return min(INTERVAL_SECONDS, lease_seconds / 2)


class ReconcilerThread(threading.Thread):
    """Reconciles every few seconds, or sooner when nudged; outlives a database that is away."""

    def __init__(
        self,
        db: Database,
        queue: Queue,
        *,
        lease_seconds: float = math.inf,
        interval_seconds: float = INTERVAL_SECONDS,
        webhook_private: bool = False,
    ) -> None:
        """Looks every `interval_seconds`, and at least twice within `lease_seconds`.

        Sends webhooks beside that, to private addresses as well where `webhook_private`.
        """
        super().__init__(name="penstock-reconciler", daemon=True)
        self._db, self._queue = db, queue
        self._sender = Sender(db, private=webhook_private)
        self._interval = min(interval_seconds, lease_seconds / 2)
        self._nudged, self._stopping = threading.Event(), threading.Event()

    def nudge(self) -> None:
        """Look soon, however often this is called at most once a second or an interval."""
        self._nudged.set()

    def stop(self) -> None:
        """End after the look that is under way."""
        self._stopping.set()
        self._nudged.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(_STOP_SECONDS)
        self._sender.stop()

    def run(self) -> None:
        """Look, wait, look again, until stopped; never raises."""
        self._sender.start()
        while not self._stopping.is_set():
            self._nudged.clear()
            began = time.monotonic()
            self._look()
            self._nudged.wait(self._interval)
            least = min(_LEAST_SECONDS, self._interval)
            self._stopping.wait(max(0.0, began + least - time.monotonic()))

    def _look(self) -> None:
        try:
            reconcile(self._db, self._queue)
        except PenstockError as error:  # the database is away: the next look may find it back
            log.warning("reconcile.failed error=%s", error)
        except Exception:
            log.exception("reconcile.failed")
