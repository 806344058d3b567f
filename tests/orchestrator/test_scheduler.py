"""Ticks for a fleet that is there, a reconciler for one that is not; any number at once."""

import time
from collections.abc import Callable, Iterator

import pytest

from orchestrator import metrics
from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.queue import ORCHESTRATOR_QUEUE, RECONCILE, Queue
from orchestrator.scheduler import Scheduler
from orchestrator.settings import Settings
from tests.nudges import embedded_queue, taken
from tests.orchestrator.db.builders import claim_some, small_plan, write

PATIENCE_SECONDS = 30


@pytest.fixture
def queue() -> Iterator[Queue]:
    made = embedded_queue(ORCHESTRATOR_QUEUE)
    yield made
    made.close()


def eventually(found: Callable[[], bool]) -> bool:
    """Whether it comes true; how soon is nobody's business."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not found():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def left_behind(db: Database) -> str:
    """A job whose requests a worker holds no more; nobody has noticed."""
    job_id = store.insert_job(db, small_plan())
    begun = [write(claimed, 0, (7,), "x") for claimed in claim_some(db)]
    assert not store.flush(db, begun, lease_seconds=0.01).lost
    return job_id


def test_it_ticks_while_a_live_worker_is_known(db: Database, queue: Queue) -> None:
    store.register_worker(db, store.WorkerInfo("w", "host", 1, "tiny", "cpu", 4))
    got: list[str] = []
    with Scheduler(db, queue, interval_seconds=0.1, reconcile_here=False) as scheduler:
        assert eventually(
            lambda: got.extend(t for t, _ in taken(queue, ORCHESTRATOR_QUEUE)) or len(got) > 2
        )
        assert scheduler.alive
    assert set(got) == {RECONCILE}
    assert not scheduler.alive


def test_without_workers_nothing_piles_up_and_the_work_is_done_here(
    db: Database, queue: Queue
) -> None:
    job_id = left_behind(db)
    with Scheduler(db, queue, interval_seconds=0.1):
        assert eventually(lambda: views.job_status(db, job_id).queued == 4)
    assert taken(queue, ORCHESTRATOR_QUEUE) == []


def test_two_at_once_release_each_request_once(db: Database, queue: Queue) -> None:
    job_id = left_behind(db)
    with (
        Scheduler(db, queue, interval_seconds=0.1),
        Scheduler(db, embedded_queue(), interval_seconds=0.1),
    ):
        assert eventually(lambda: views.job_status(db, job_id).queued == 4)
        assert {claimed.epoch for claimed in claim_some(db, lease=600)} == {2}
        time.sleep(0.5)
        assert views.job_status(db, job_id).running == 4, "a good lease is left alone"


def test_a_tick_in_a_process_without_a_worker_stays_nowhere(sqlite_db: Database) -> None:
    unserved = Queue(Settings())
    assert not unserved.reconcile() and not unserved.wake("tiny")
    assert taken(unserved, ORCHESTRATOR_QUEUE) == []
    unserved.close()


def test_a_broker_that_is_away_stops_neither_ticks_nor_reconciling(sqlite_db: Database) -> None:
    store.register_worker(sqlite_db, store.WorkerInfo("w", "host", 1, "tiny", "cpu", 4))
    away = Queue(Settings(broker_url="redis://127.0.0.1:1/0"))
    before = metrics.NUDGES_LOST.labels(RECONCILE)._value.get()
    with Scheduler(sqlite_db, away, interval_seconds=0.1) as scheduler:
        assert eventually(
            lambda: metrics.NUDGES_LOST.labels(RECONCILE)._value.get() >= before + 3
        ), "each tick is tried, and lost, by itself"
        job_id = left_behind(sqlite_db)
        assert eventually(lambda: views.job_status(sqlite_db, job_id).queued == 4)
        assert scheduler.alive
    away.close()
