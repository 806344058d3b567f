"""The composition root: a Celery worker, solo pool, whose bootstep owns the crew of threads.

Messages only nudge the threads, so that the consumer stays responsive: it never waits for a step.
`LocalWorker` lives in a thread beside somebody else's main thread; `FleetWorker` is the command's
process, with its signals.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from types import FrameType

from celery import bootsteps
from celery.worker import WorkController
from celery.worker import state as celery_state

from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.metrics import MetricsServer
from orchestrator.queue import ORCHESTRATOR_QUEUE, Queue, model_queue
from orchestrator.settings import Settings
from workers.crew import Crew
from workers.engine_thread import EngineThread
from workers.loading.model import LoadedModel

log = logging.getLogger("penstock.worker")
_READY_SECONDS = 5.0
_STOP_SECONDS = 30.0
_WATCH_SECONDS = 0.2


class LocalWorker:
    """A worker in threads of this process."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        queue: Queue,
        model: LoadedModel,
        job_id: str | None = None,
    ) -> None:
        self._crew = Crew(settings, db, queue, [model], job_id=job_id)
        self._queue = queue
        self._ready = threading.Event()
        self._celery = _controller(queue, self._crew, self._ready.set)
        self._thread = threading.Thread(
            target=self._celery.start, name="penstock-celery", daemon=True
        )

    @property
    def engine(self) -> EngineThread:
        """The thread of its one engine."""
        return self._crew.engines[0]

    @property
    def error(self) -> BaseException | None:
        """What ended the engine, if it ended by itself."""
        return self._crew.error

    @property
    def alive(self) -> bool:
        """The engine's thread is at work."""
        return self._crew.alive

    def start(self) -> None:
        """Begin; returns when the consumer is ready, or soon, where the broker is away."""
        self._thread.start()
        self._ready.wait(_READY_SECONDS)

    def stop(self) -> None:
        """Stop the engine, which flushes at once, and consuming: released when this returns."""
        self._crew.ask_to_stop()
        celery_state.should_stop = 0
        _unblock(self._queue, self._crew)
        self._thread.join(_STOP_SECONDS)
        celery_state.should_stop = None
        self._crew.stop()


@contextmanager
def local_worker(
    settings: Settings, db: Database, queue: Queue, model: LoadedModel, job_id: str | None = None
) -> Iterator[LocalWorker]:
    """A worker at work in this process for the time of the block, on one job or on all."""
    worker = LocalWorker(settings, db, queue, model, job_id)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


class FleetWorker:
    """A worker that is this process: `run` takes the main thread and its signals."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        queue: Queue,
        models: Sequence[LoadedModel],
        *,
        metrics_port: int | None = None,
    ) -> None:
        """`metrics_port` 0 takes any free one, None shows no metrics."""
        self._settings, self._db, self._metrics_port = settings, db, metrics_port
        self._crew = Crew(settings, db, queue, models, lasting=True, ended=self._engine_ended)
        self._celery = _controller(queue, self._crew, lambda: log.info("worker.ready"))
        self._queue = queue
        self._leave_by: float | None = None

    def run(self) -> int:
        """Work until SIGTERM or SIGINT; 0 if everything was flushed and released, else 1.

        The first signal gives the engines `grace_seconds`; the second leaves at once.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="penstock-watch", daemon=True).start()
        with ExitStack() as open_until_end:
            if self._metrics_port is not None:
                server = MetricsServer(self._metrics_port, lambda: views.queue_depths(self._db))
                open_until_end.enter_context(closing(server))
            self._celery.start()
            self._crew.stop()
        return self._code

    @property
    def _code(self) -> int:
        return 1 if self._crew.error or self._crew.working else 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._leave_by is not None:
            os._exit(128 + number)
        self._leave_by = time.monotonic() + self._settings.grace_seconds
        self._crew.ask_to_stop()
        celery_state.should_stop = 0

    def _engine_ended(self) -> None:
        celery_state.should_stop = 1

    def _watch(self) -> None:
        """Leave when the grace is over, or when a step hangs: the leases give it all back."""
        while True:
            time.sleep(_WATCH_SECONDS)
            if self._leave_by is not None and self._queue.embedded:
                _unblock(self._queue, self._crew)
            if self._leave_by is not None and time.monotonic() > self._leave_by:
                log.error("worker.grace_over seconds=%s", self._settings.grace_seconds)
                os._exit(self._code)  # 0 where only the broker's goodbye is missing
            if self._crew.step_seconds > self._settings.stall_seconds:
                log.error("worker.stalled seconds=%s", self._settings.stall_seconds)
                os._exit(1)


def _controller(queue: Queue, crew: Crew, ready: Callable[[], None]) -> WorkController:
    """A Celery worker on the queues of the crew's models."""
    queue.serve(crew.handlers())
    queue.app.steps["worker"].clear()
    queue.app.steps["worker"].add(_crew_step(crew))
    models = [engine.state.model for engine in crew.engines]
    return WorkController(
        app=queue.app,
        hostname=f"{crew.engines[0].worker_id}@{socket.gethostname()}",
        pool_cls="solo",
        concurrency=1,
        loglevel="ERROR",
        queues=[*map(model_queue, models), ORCHESTRATOR_QUEUE],
        without_gossip=True,
        without_heartbeat=True,
        without_mingle=True,
        ready_callback=lambda consumer: ready(),
    )


def _unblock(queue: Queue, crew: Crew) -> None:
    """Let a consumer that is to stop look at the flag.

    The embedded transport's loop does between messages, and waits for one more before it leaves:
    two nudges spare the two seconds of its poll.
    """
    for _ in range(2):
        queue.wake(crew.engines[0].state.model)


def _crew_step(crew: Crew) -> type[bootsteps.StartStopStep]:
    class CrewStep(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.components:Pool",)

        def start(self, worker: WorkController) -> None:
            crew.start()

        def stop(self, worker: WorkController) -> None:
            crew.stop()

    return CrewStep


__all__ = ["FleetWorker", "LoadedModel", "LocalWorker", "local_worker"]
