"""What was published to a broker in this process: taken out of its queues, and told."""

from queue import Empty
from typing import Any

from orchestrator.queue import Handlers, Queue
from orchestrator.settings import Settings


def embedded_queue(*emptied: str) -> Queue:
    """A queue on the broker of this process, as one that is served; these of it emptied."""
    queue = Queue(Settings())
    queue.serve(
        Handlers(
            wake=lambda model: None,
            grade=lambda job_id: None,
            reconcile=lambda: None,
            state=lambda: {},
        )
    )
    for name in emptied:
        taken(queue, name)
    return queue


def taken(queue: Queue, name: str) -> list[tuple[str, list[Any]]]:
    """Take every message out of the broker's queue `name`: (task, arguments) each."""
    found = []
    with queue.app.connection_for_read() as connection:
        simple = connection.SimpleQueue(name)
        try:
            while True:
                message = simple.get_nowait()
                message.ack()
                found.append((message.headers["task"], list(message.payload[0])))
        except Empty:
            return found
        finally:
            simple.close()
