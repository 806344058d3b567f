"""Prometheus metrics of one process, and the port that shows them (loopback only).

Counters and histograms are counted where things happen; the depth of the queues is read from the
database when somebody asks. Knows nothing of SQL: whoever serves gives the function that reads.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.errors import PenstockError, WorkerError

log = logging.getLogger("penstock.metrics")

REGISTRY = CollectorRegistry()
# A second line for each counter, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]
_MODEL = ("model",)


def _counter(name: str, what: str, labels: Iterable[str] = _MODEL) -> Counter:
    return Counter(name, what, tuple(labels), registry=REGISTRY)


def _gauge(name: str, what: str) -> Gauge:
    return Gauge(name, what, _MODEL, registry=REGISTRY)


CLAIMS = _counter("penstock_claims", "Requests claimed by this process.")
STEPS = _counter("penstock_steps", "Decode steps of the running batch.")
TOKENS = _counter("penstock_tokens", "New completion tokens; their rate is tokens/s.")
PROMPT_TOKENS = _counter("penstock_prompt_tokens", "Tokens of the prompts that were begun.")
CACHED_TOKENS = _counter(
    "penstock_cached_tokens", "Those of them whose KV was there; their share is the hit rate."
)
PREFIXES_EVICTED = _counter("penstock_prefix_evictions", "Entries the prefix cache gave up.")
REPLAYED = _counter("penstock_replayed_tokens", "Persisted tokens that were computed again.")
LOST = _counter("penstock_leases_lost", "Requests whose claim was somebody else's at the flush.")
OUTCOMES = _counter("penstock_requests", "Requests that ended here.", ("model", "outcome"))
ERRORS = _counter("penstock_worker_errors", "Steps that failed.", ("model", "code"))
NUDGES_LOST = _counter("penstock_nudges_lost", "Nudges the broker did not take.", ("task",))
PREFIX_BYTES = _gauge("penstock_prefix_bytes", "What the prefix cache holds.")
SLOTS = _gauge("penstock_slots", "Rows that the running batch may have.")
SLOTS_USED = _gauge("penstock_slots_used", "Rows of the running batch.")
OCCUPANCY = Histogram(
    "penstock_batch_occupancy",
    "Share of the slots that a step used.",
    _MODEL,
    buckets=(0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
    registry=REGISTRY,
)
FLUSH_SECONDS = Histogram(
    "penstock_flush_seconds",
    "How long a flush took, from its first statement to its COMMIT.",
    _MODEL,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
    registry=REGISTRY,
)


class Depth(Protocol):
    """What is read of one model's queue: `orchestrator.db.views.queue_depths` gives them."""

    @property
    def queued(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def oldest_waiting_seconds(self) -> float | None: ...


Depths = Callable[[], Mapping[str, Depth]]


class QueueCollector(Collector):
    """The depth of the queues, read anew for each scrape; left out while the database is away."""

    def __init__(self, depths: Depths) -> None:
        self._depths = depths

    def collect(self) -> Iterator[Metric]:
        """One gauge a kind, a sample a model."""
        try:
            depths = self._depths()
        except PenstockError as error:
            log.warning("metrics.skipped error=%s", error)
            return
        fields = (
            ("penstock_queue_depth", "Requests that wait.", "queued"),
            ("penstock_queue_running", "Requests that run somewhere.", "running"),
            (
                "penstock_queue_oldest_waiting_seconds",
                "How long the oldest claimable request has waited.",
                "oldest_waiting_seconds",
            ),
        )
        for name, what, field in fields:
            family = GaugeMetricFamily(name, what, labels=_MODEL)
            for model, depth in depths.items():
                family.add_metric([model], getattr(depth, field) or 0.0)
            yield family


class MetricsServer:
    """The port at which a process shows its metrics; `close` frees it."""

    def __init__(self, port: int, depths: Depths) -> None:
        """Serve on 127.0.0.1; 0 takes any free port. Raises WorkerError if the port is taken."""
        self._collector = QueueCollector(depths)
        try:
            self._server, self._thread = start_http_server(port, "127.0.0.1", REGISTRY)
        except OSError as error:
            raise WorkerError("metrics", f"--metrics-port {port}: {error.strerror}") from error
        REGISTRY.register(self._collector)
        self.port = int(self._server.server_port)
        log.warning("metrics.served url=http://127.0.0.1:%s/metrics", self.port)

    def close(self) -> None:
        """Stop serving."""
        REGISTRY.unregister(self._collector)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
