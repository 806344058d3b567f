"""Metrics: each is documented, depths are read at the scrape, a port that is taken is refused."""

import urllib.request
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from orchestrator import metrics
from orchestrator.errors import WorkerError
from orchestrator.metrics import REGISTRY, MetricsServer, QueueCollector

DOCS = Path(__file__).parents[2] / "docs" / "workers.md"


@dataclass
class Depth:
    queued: int
    running: int
    oldest_waiting_seconds: float | None


def depths() -> Mapping[str, Depth]:
    return {"tiny": Depth(7, 2, 3.5), "other": Depth(0, 1, None)}


def away() -> Mapping[str, Depth]:
    raise WorkerError("database", "connection refused")


def test_every_metric_is_documented() -> None:
    told = DOCS.read_text()
    families = [*REGISTRY.collect(), *QueueCollector(depths).collect()]
    names = {f"{f.name}_total" if f.type == "counter" else f.name for f in families}
    assert len(names) >= 14
    assert not [name for name in names if f"`{name}`" not in told]


def test_the_depth_of_the_queues_is_read_at_each_scrape_and_left_out_when_it_cannot_be() -> None:
    with closing(MetricsServer(0, depths)) as server:
        metrics.CLAIMS.labels("tiny").inc(0)
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            shown = answer.read().decode()
        assert 'penstock_queue_depth{model="tiny"} 7.0' in shown
        assert 'penstock_queue_oldest_waiting_seconds{model="tiny"} 3.5' in shown
        assert 'penstock_queue_oldest_waiting_seconds{model="other"} 0.0' in shown
        assert "penstock_claims_total" in shown
        with pytest.raises(WorkerError, match=f"--metrics-port {server.port}"):
            MetricsServer(server.port, depths)
    with closing(MetricsServer(0, away)):
        shown = generate_latest(REGISTRY).decode()
        assert "penstock_queue_depth" not in shown and "penstock_claims_total" in shown
