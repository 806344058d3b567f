"""The threads of one worker process: an engine per model, a reconciler, a grader.

What nudges and inspect commands ask for is passed on at once. Knows nothing of Celery or signals.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from orchestrator.db.database import Database
from orchestrator.queue import Handlers, Queue
from orchestrator.reconciler import ReconcilerThread
from orchestrator.settings import Settings
from workers.engine_thread import EngineThread
from workers.grading import GradingThread
from workers.loading.model import LoadedModel
from workers.running.memory import resident_bytes


class Crew:
    """Starts and stops them together; `ended` is called when an engine ends by itself."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        queue: Queue,
        models: Sequence[LoadedModel],
        *,
        job_id: str | None = None,
        lasting: bool = False,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.grading = GradingThread(db, queue)
        self.reconciler = ReconcilerThread(
            db,
            queue,
            lease_seconds=settings.lease_seconds,
            webhook_private=settings.webhook_private,
        )
        self.engines = [
            EngineThread(
                settings,
                db,
                model,
                job_id=job_id,
                lasting=lasting,
                finished=self.grading.announce,
                ended=ended,
            )
            for model in models
        ]

    @property
    def error(self) -> BaseException | None:
        """What ended an engine, if one ended by itself."""
        return next((engine.error for engine in self.engines if engine.error), None)

    @property
    def alive(self) -> bool:
        """Every engine is at work."""
        return all(engine.is_alive() for engine in self.engines)

    @property
    def working(self) -> bool:
        """Some engine is still at work."""
        return any(engine.is_alive() for engine in self.engines)

    @property
    def step_seconds(self) -> float:
        """How long the longest step that is under way has taken."""
        return max(engine.step_seconds for engine in self.engines)

    def handlers(self) -> Handlers:
        """What nudges lead to."""
        return Handlers(
            wake=self.wake,
            grade=self.grading.grade,
            reconcile=self.reconciler.nudge,
            state=self.state,
        )

    def wake(self, model: str) -> None:
        """There may be work for `model`."""
        for engine in self.engines:
            if engine.state.model == model:
                engine.nudge()

    def state(self) -> dict[str, object]:
        """The answer to `penstock_state`."""
        return {
            "memory_bytes": resident_bytes(),
            "engines": [asdict(engine.state) for engine in self.engines],
        }

    def start(self) -> None:
        """Begin."""
        for thread in (*self.engines, self.grading, self.reconciler):
            thread.start()

    def ask_to_stop(self) -> None:
        """Let the engines flush and release; returns at once."""
        for engine in self.engines:
            engine.ask_to_stop()

    def stop(self) -> None:
        """Stop all; what was claimed is flushed and released when this returns."""
        self.ask_to_stop()
        for engine in self.engines:
            engine.stop()
        self.grading.stop()
        self.reconciler.stop()
