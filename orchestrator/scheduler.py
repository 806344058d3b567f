"""The ticks: Celery beat in a thread, and a reconciler beside it.

Beat fires one message, `penstock.reconcile`, and carries no state: any number of schedulers may
run, and none needs to. Where no worker takes the tick, the reconciler here does the work. Knows
nothing of devices, nor of what a tick will start later (schedules).
"""

import logging
import threading
from typing import Any, Self

from celery import beat

from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.errors import PenstockError
from orchestrator.queue import RECONCILE, Queue
from orchestrator.reconciler import INTERVAL_SECONDS, ReconcilerThread

_STOP_SECONDS = 10.0

log = logging.getLogger("penstock.scheduler")


class Scheduler:
    """Ticks and reconciles from `start` to `stop`, in two threads of this process."""

    def __init__(
        self,
        db: Database,
        queue: Queue,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
        reconcile_here: bool = True,
        webhook_private: bool = False,
    ) -> None:
        """`reconcile_here` is false in a process whose worker has a reconciler already."""
        self._queue, self._interval = queue, interval_seconds
        self._service = beat.Service(
            queue.app,
            # Beat sleeps this long at most, and so is stopped within a second.
            max_interval=min(1.0, interval_seconds),
            scheduler_cls=_ticker(db, queue),
        )
        self._thread = threading.Thread(target=self._tick, name="penstock-beat", daemon=True)
        self._reconciler = (
            ReconcilerThread(
                db, queue, interval_seconds=interval_seconds, webhook_private=webhook_private
            )
            if reconcile_here
            else None
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        """Both threads are at work."""
        reconciling = self._reconciler is None or self._reconciler.is_alive()
        return self._thread.is_alive() and reconciling

    def start(self) -> None:
        """Begin to tick and to reconcile; returns at once."""
        self._queue.app.conf.beat_schedule = {
            "tick": {"task": RECONCILE, "schedule": self._interval},
        }
        self._thread.start()
        if self._reconciler is not None:
            self._reconciler.start()

    def stop(self) -> None:
        """End both threads; waits for the look that is under way."""
        self._service.stop()
        if self._reconciler is not None:
            self._reconciler.stop()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def _tick(self) -> None:
        try:
            self._service.start()
        except Exception:
            log.exception("scheduler.failed")


def _ticker(db: Database, queue: Queue) -> type[beat.Scheduler]:
    class Ticker(beat.Scheduler):  # type: ignore[misc]
        """Beat's own loop and timing, but published by `Queue`: bounded in time, never failing."""

        # Beat's own would wait for a broker that is away, and give up after a hundred tries.
        producer = None

        def apply_async(self, entry: Any, **options: object) -> None:
            # A tick that nobody will take stays in the broker for ever.
            if _is_served(db):
                queue.reconcile()

    return Ticker


def _is_served(db: Database) -> bool:
    try:
        return bool(views.live_workers(db))
    except PenstockError as error:
        log.warning("tick.skipped error=%s", error)
        return False
