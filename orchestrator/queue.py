"""The Celery app: its settings, its queues, and the nudges that are sent through it.

A message carries no work: it says that there is work for a model, that a job may be graded, or
that somebody should look after what was left behind. The rows are the truth, so a message that is
lost, doubled or reordered changes nothing. Knows nothing of what is done with a nudge
(workers/process.py) nor of SQL.

`celery -A orchestrator.queue inspect penstock_state` finds the app of this environment here.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import redis
from celery import Celery
from celery.worker.control import inspect_command
from kombu.exceptions import KombuError, OperationalError

from orchestrator import metrics
from orchestrator.errors import WorkerError
from orchestrator.settings import Settings

ORCHESTRATOR_QUEUE = "orchestrator"
WAKE, GRADE, RECONCILE = "penstock.wake", "penstock.grade", "penstock.reconcile"
_PUBLISH_TIMEOUT_SECONDS = 2.0
_EXPIRES_SECONDS = 600

log = logging.getLogger("penstock.queue")


def model_queue(model: str) -> str:
    """The name of the queue that carries nudges for `model`."""
    return f"model.{model}"


@dataclass(frozen=True, slots=True)
class Handlers:
    """What a worker does with nudges; each returns at once, or the consumer goes deaf.

    `state` answers the inspect command `penstock_state` with values that JSON knows.
    """

    wake: Callable[[str], None]
    grade: Callable[[str], None]
    reconcile: Callable[[], None]
    state: Callable[[], Mapping[str, object]]


class Queue:
    """The broker as the rest of Penstock sees it: verbs that never fail the caller, nor hold it."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.broker_url
        self.embedded = self.url.startswith("memory:")
        # Nudges in this process that nobody here takes would stay in its memory for ever.
        self._heard = not self.embedded
        # kombu warns of a missing host, which the embedded transport has none of.
        broker = "memory://localhost/" if self.embedded else self.url
        self.app = Celery("penstock", broker=broker, set_as_current=False)
        self.app.conf.update(
            accept_content=["json"],
            broker_connection_max_retries=None,
            broker_connection_retry_on_startup=True,
            broker_connection_timeout=_PUBLISH_TIMEOUT_SECONDS,
            broker_transport_options=_transport_options(self.url),
            task_ignore_result=True,
            task_serializer="json",
            task_store_errors_even_if_ignored=False,
            worker_cancel_long_running_tasks_on_connection_loss=False,
            worker_hijack_root_logger=False,
            worker_prefetch_multiplier=1,
        )

    def wake(self, model: str) -> bool:
        """Tell a worker that there is work for `model`; False (and a log line) if it was lost."""
        return self._publish(WAKE, [model], model_queue(model))

    def grade(self, job_id: str) -> bool:
        """Tell the orchestrator's own queue that finished choices of a job wait for their score."""
        return self._publish(GRADE, [job_id], ORCHESTRATOR_QUEUE)

    def reconcile(self) -> bool:
        """Tell some worker to look after dead leases and whatever else was left behind."""
        return self._publish(RECONCILE, [], ORCHESTRATOR_QUEUE)

    def serve(self, handlers: Handlers) -> None:
        """Register the tasks and the answer to `penstock_state`; replaces those before."""

        def wake(model: str) -> None:
            handlers.wake(model)

        def grade(job_id: str) -> None:
            handlers.grade(job_id)

        def reconcile() -> None:
            handlers.reconcile()

        self._heard = True
        self.app.set_default()  # the consumer looks its tasks up in the default app
        self.app.penstock_state = handlers.state
        for name, body in ((WAKE, wake), (GRADE, grade), (RECONCILE, reconcile)):
            self.app.tasks.pop(name, None)
            # Not shared: every other app of this process would get these bodies too.
            self.app.task(name=name, ignore_result=True, shared=False)(body)
        self.app.finalize()

    def check_broker(self) -> None:
        """Refuse a Redis that may drop keys when it is full: WorkerError, with the line to change.

        One that cannot be asked is let pass with a warning: it may be away for the moment, or
        CONFIG may be closed to us.
        """
        if not self.url.startswith(("redis://", "rediss://")):
            return
        timeouts = {
            "socket_timeout": _PUBLISH_TIMEOUT_SECONDS,
            "socket_connect_timeout": _PUBLISH_TIMEOUT_SECONDS,
        }
        try:
            with redis.Redis.from_url(self.url, decode_responses=True, **timeouts) as client:
                found = client.config_get("maxmemory*")
        except redis.RedisError as error:
            log.warning("broker.unchecked error=%s", type(error).__name__)
            return
        policy = found.get("maxmemory-policy", "noeviction")
        if int(found.get("maxmemory", 0)) > 0 and policy != "noeviction":
            raise WorkerError(
                "broker",
                f"the broker may drop messages when it is full (maxmemory-policy {policy}): put "
                "`maxmemory-policy noeviction` into redis.conf, or run "
                "`redis-cli CONFIG SET maxmemory-policy noeviction`",
            )

    def _publish(self, task: str, arguments: list[str], queue: str) -> bool:
        if not self._heard:
            return False
        try:
            self.app.send_task(
                task, args=arguments, queue=queue, retry=False, expires=_EXPIRES_SECONDS
            )
        except (OperationalError, KombuError, redis.RedisError, OSError) as error:
            log.warning("nudge.lost task=%s queue=%s error=%s", task, queue, type(error).__name__)
            metrics.NUDGES_LOST.labels(task).inc()
            return False
        return True

    def close(self) -> None:
        """Close the connections that publishing opened."""
        self.app.close()


def _transport_options(url: str) -> dict[str, object]:
    if url.startswith("memory:"):
        # The embedded transport is polled: its interval bounds how late a nudge may be.
        return {"polling_interval": 0.05}
    if url.startswith(("redis:", "rediss:")):
        # A Redis that hangs must not hold who publishes, nor the consumer, which would be deaf.
        return {
            "socket_timeout": _PUBLISH_TIMEOUT_SECONDS,
            "socket_connect_timeout": _PUBLISH_TIMEOUT_SECONDS,
            "socket_keepalive": True,
            "retry_on_timeout": False,
            "max_retries": 0,
        }
    return {}


@inspect_command(name="penstock_state")  # type: ignore[untyped-decorator]
def penstock_state(state: object, **_: object) -> Mapping[str, object]:
    """Slots in use, tokens/s, memory and claims of each model of this worker."""
    answer: Callable[[], Mapping[str, object]] | None
    answer = getattr(state.app, "penstock_state", None)  # type: ignore[attr-defined]
    return answer() if answer else {}


def __getattr__(name: str) -> object:
    """`app`, the Celery app of this environment, for the `celery` command alone."""
    if name == "app":
        return Queue(Settings.from_env()).app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
