"""The Celery app: its settings, its queues, and the nudges that are sent through it.

A message carries no work: it says that there is work for a model, or that a job may be graded.
The rows are the truth, so a message that is lost, doubled or reordered changes nothing.
Knows nothing of what is done with a nudge (workers/process.py) nor of SQL.
"""

import logging

from celery import Celery
from kombu.exceptions import OperationalError

from orchestrator.settings import Settings

ORCHESTRATOR_QUEUE = "orchestrator"
WAKE, GRADE = "penstock.wake", "penstock.grade"
_PUBLISH_TIMEOUT_SECONDS = 2.0

log = logging.getLogger("penstock.queue")


def model_queue(model: str) -> str:
    """The name of the queue that carries nudges for `model`."""
    return f"model.{model}"


class Queue:
    """The broker as the rest of Penstock sees it: two verbs that never fail the caller."""

    def __init__(self, settings: Settings) -> None:
        self.embedded = settings.broker_url.startswith("memory:")
        # kombu warns of a missing host, which the embedded transport has none of.
        broker = "memory://localhost/" if self.embedded else settings.broker_url
        self.app = Celery("penstock", broker=broker, set_as_current=False)
        self.app.conf.update(
            accept_content=["json"],
            broker_connection_retry_on_startup=True,
            broker_connection_timeout=_PUBLISH_TIMEOUT_SECONDS,
            # The embedded transport is polled: its interval bounds how late a nudge may be.
            broker_transport_options={"polling_interval": 0.05} if self.embedded else {},
            task_ignore_result=True,
            task_serializer="json",
            task_store_errors_even_if_ignored=False,
            worker_hijack_root_logger=False,
            worker_prefetch_multiplier=1,
        )

    def wake(self, model: str) -> bool:
        """Tell a worker that there is work for `model`; False (and a log line) if it was lost."""
        return self._publish(WAKE, model, model_queue(model))

    def grade(self, job_id: str) -> bool:
        """Tell the orchestrator's own queue that finished choices of a job wait for their score."""
        return self._publish(GRADE, job_id, ORCHESTRATOR_QUEUE)

    def _publish(self, task: str, argument: str, queue: str) -> bool:
        try:
            self.app.send_task(task, args=[argument], queue=queue, retry=False)
        except (OperationalError, OSError) as error:
            log.warning("nudge.lost task=%s queue=%s error=%s", task, queue, type(error).__name__)
            return False
        return True

    def close(self) -> None:
        """Close the connections that publishing opened."""
        self.app.close()
