"""The composition root: a Celery worker whose bootstep owns the engine's thread.

Messages only nudge the thread; it claims from the database while it has room, steps the engine,
and lets the recorder flush. The consumer stays responsive since it never waits for a step.
"""

import hashlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from celery import bootsteps
from celery.worker import WorkController
from celery.worker import state as celery_state

from orchestrator import lifecycle
from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.errors import PenstockError, RequestError, WorkerError
from orchestrator.queue import GRADE, ORCHESTRATOR_QUEUE, WAKE, Queue, model_queue
from orchestrator.settings import Settings
from workers.admission import to_completion
from workers.chat import ChatTemplate, eos_token_ids
from workers.engine import Engine
from workers.folder import ModelFolder
from workers.prepare import PREPARE_VERSION
from workers.recorder import Recorder
from workers.runner import RUNTIME_VERSION, Runner
from workers.sampler import SAMPLER_VERSION
from workers.tokenizer import Tokenizer

log = logging.getLogger("penstock.worker")
_GRADE_INTERVAL_SECONDS = 1.0
_SEEN_INTERVAL_SECONDS = 10.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory: what turns messages into prompts and prompts into logits."""

    folder: ModelFolder
    runner: Runner
    tokenizer: Tokenizer
    template: ChatTemplate
    eos: frozenset[int]
    fingerprint: str

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        settings: Settings,
        *,
        slots: int | None = None,
        device: str = "cpu",
    ) -> "LoadedModel":
        """Open tokenizer, template and session; raises WorkerError with the reason."""
        tokenizer = Tokenizer(folder.path)
        template = ChatTemplate.load(folder.path)
        runner = Runner(
            folder.path,
            slots=slots or settings.slots,
            max_length=settings.max_context,
            device=device,
            threads=settings.threads,
            cache=settings.cache_dir,
        )
        eos = eos_token_ids(folder.path, tokenizer)
        return cls(folder, runner, tokenizer, template, eos, _fingerprint(folder, runner))


def _fingerprint(folder: ModelFolder, runner: Runner) -> str:
    """Everything that may change a token: the reference, section 2.5."""
    facts = (
        folder.digest(),
        PREPARE_VERSION,
        SAMPLER_VERSION,
        RUNTIME_VERSION,
        runner.device,
        runner.threads,
    )
    return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:10]


class EngineThread(threading.Thread):
    """Claims, steps and flushes until it is stopped; `error` holds what ended it otherwise."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        queue: Queue,
        model: LoadedModel,
        job_id: str | None = None,
    ) -> None:
        """With `job_id` it claims from that job alone."""
        super().__init__(name="penstock-engine", daemon=True)
        self._settings, self._db, self._queue, self._model = settings, db, queue, model
        self._job_id = job_id
        self.worker_id = f"wrk_{uuid.uuid4().hex[:12]}"
        self.error: BaseException | None = None
        self._engine = Engine(model.runner, model.tokenizer, model.eos)
        self._recorder = Recorder(
            db,
            fingerprint=model.fingerprint,
            lease_seconds=settings.lease_seconds,
            flush_seconds=settings.flush_seconds,
        )
        self._nudged, self._stopping = threading.Event(), threading.Event()
        self._claim_at = self._grade_at = self._seen_at = 0.0

    def nudge(self) -> None:
        """There may be work: look at once."""
        self._nudged.set()

    def stop(self) -> None:
        """Flush, release what is claimed, end; waits for it."""
        self._stopping.set()
        self._nudged.set()
        if self.is_alive():
            self.join(_STOP_SECONDS)

    def run(self) -> None:
        """The engine's whole life; never raises."""
        try:
            self._register()
            while not self._stopping.is_set():
                self._turn()
            self._recorder.release()
            store.stop_worker(self._db, self.worker_id)
        except BaseException as error:  # whatever it was, the process that waits for us must know
            bug = not isinstance(error, PenstockError)
            log.error("worker.failed id=%s error=%s", self.worker_id, error, exc_info=bug)
            self.error = error
            self._give_up(error)
        finally:
            self._engine.close()

    def _give_up(self, error: BaseException) -> None:
        """Leave the claims to others; the attempt counts, since one of them may have ended us."""
        if isinstance(error, WorkerError) and error.code == "database":
            return  # it would only be waited for again: the leases run out by themselves
        with suppress(WorkerError):
            store.release_worker(self._db, self.worker_id)
            store.stop_worker(self._db, self.worker_id)

    def _turn(self) -> None:
        self._show_life()
        self._claim()
        if self._engine.idle:
            self._flush()
            self._report()
            self._nudged.wait(self._settings.poll_seconds)
            if self._nudged.is_set():
                self._claim_at = 0.0
            self._nudged.clear()
            return
        self._recorder.record(self._engine.step())
        if self._recorder.due:
            self._flush()
            self._report()

    def _claim(self) -> None:
        """Claim in lots of a quarter of the slots at least, half of them ahead of need."""
        slots = self._model.runner.slots
        room = slots + slots // 2 - self._engine.load
        if time.monotonic() < self._claim_at or (room < max(1, slots // 4) and self._engine.load):
            return
        claims = store.claim(
            self._db,
            model=self._model.folder.name,
            worker_id=self.worker_id,
            limit=room,
            lease_seconds=self._settings.lease_seconds,
            job_id=self._job_id,
        )
        if not claims:
            self._claim_at = time.monotonic() + self._settings.poll_seconds
        for claimed in claims:
            self._admit(claimed)

    def _admit(self, claimed: store.Claimed) -> None:
        log.info(
            "request.claimed id=%s epoch=%s model=%s",
            claimed.request_id,
            claimed.epoch,
            claimed.model,
        )
        # Our own lease may have run out: what is still seated belongs to the claim before this one.
        self._engine.cancel(claimed.request_id)
        self._recorder.begin(claimed)
        try:
            completion = to_completion(claimed, self._model.template, self._model.tokenizer)
            if completion.choices:
                self._engine.admit(completion)
        except RequestError as error:
            self._recorder.fail(claimed.request_id, error)

    def _flush(self) -> None:
        for request_id in self._recorder.flush():
            self._engine.cancel(request_id)

    def _report(self) -> None:
        """Let the orchestrator grade what ended; at most once a second, never forgotten."""
        jobs, now = self._recorder.finished_jobs, time.monotonic()
        if jobs and now >= self._grade_at:
            self._grade_at = now + _GRADE_INTERVAL_SECONDS
            while jobs:
                self._queue.grade(jobs.pop())

    def _show_life(self) -> None:
        if time.monotonic() >= self._seen_at:
            self._seen_at = time.monotonic() + _SEEN_INTERVAL_SECONDS
            store.see_worker(self._db, self.worker_id)
            if self._engine.idle:  # nothing of our own is held: what has expired is a dead worker's
                store.release_expired(self._db)

    def _register(self) -> None:
        runner = self._model.runner
        info = store.WorkerInfo(
            id=self.worker_id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            model=self._model.folder.name,
            device=runner.device,
            slots=runner.slots,
        )
        store.register_worker(self._db, info)


class LocalWorker:
    """A Celery worker, solo pool, in a thread of this process."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        queue: Queue,
        model: LoadedModel,
        job_id: str | None = None,
    ) -> None:
        self.engine = EngineThread(settings, db, queue, model, job_id)
        self._queue = queue
        self._model = model.folder.name
        self._ready = threading.Event()
        _register_tasks(queue, db, self.engine)
        queue.app.steps["worker"].clear()
        queue.app.steps["worker"].add(_engine_step(self.engine))
        self._celery = WorkController(
            app=queue.app,
            hostname=f"{self.engine.worker_id}@{socket.gethostname()}",
            pool_cls="solo",
            concurrency=1,
            loglevel="ERROR",
            queues=[model_queue(self._model), ORCHESTRATOR_QUEUE],
            without_gossip=True,
            without_heartbeat=True,
            without_mingle=True,
            ready_callback=lambda consumer: self._ready.set(),
        )
        self._thread = threading.Thread(target=self._consume, name="penstock-celery", daemon=True)

    @property
    def error(self) -> BaseException | None:
        """What ended the engine, if it ended by itself."""
        return self.engine.error

    @property
    def alive(self) -> bool:
        """The engine's thread is at work."""
        return self.engine.is_alive()

    def start(self) -> None:
        """Begin to consume; returns when the consumer is ready."""
        self._thread.start()
        self._ready.wait(_STOP_SECONDS)

    def stop(self) -> None:
        """Stop consuming, then the engine: flushed and released when this returns."""
        celery_state.should_stop = 0
        # The embedded transport's loop looks at the flag between messages, and waits for one more
        # before it leaves: two nudges spare the two seconds of its poll.
        self._queue.wake(self._model)
        self._queue.wake(self._model)
        self._thread.join(_STOP_SECONDS)
        celery_state.should_stop = None
        self.engine.stop()

    def _consume(self) -> None:
        self._queue.app.set_current()  # of this thread: where the solo pool looks tasks up
        self._celery.start()


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


def _engine_step(engine: EngineThread) -> type[bootsteps.StartStopStep]:
    class EngineStep(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.components:Pool",)

        def start(self, worker: WorkController) -> None:
            engine.start()

        def stop(self, worker: WorkController) -> None:
            engine.stop()

    return EngineStep


def _register_tasks(queue: Queue, db: Database, engine: EngineThread) -> None:
    def wake(model: str) -> None:
        engine.nudge()

    def grade(job_id: str) -> None:
        lifecycle.grade(db, job_id)

    for name, body in ((WAKE, wake), (GRADE, grade)):
        queue.app.tasks.pop(name, None)
        # Not shared: Celery would give this body, bound to this engine, to every other app too.
        queue.app.task(name=name, ignore_result=True, shared=False)(body)
    queue.app.finalize()
