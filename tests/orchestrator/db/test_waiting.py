"""Why a job waits, in words, and how long the queues are."""

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import WorkerInfo, flush
from orchestrator.errors import NotFound
from tests.orchestrator.db.builders import claim_some, pairs, run, small_plan, write


def reasons(db: Database, job_id: str) -> tuple[str, ...]:
    """Of the job's waiting."""
    return views.waiting(db, job_id).reasons


@pytest.fixture
def served(db: Database) -> Database:
    """A worker of two slots serves the model tiny."""
    store.register_worker(db, WorkerInfo("w", "host", 1, "tiny", "cpu", 2))
    return db


def test_nobody_serves_the_model(db: Database) -> None:
    job_id = store.insert_job(db, small_plan())
    assert reasons(db, job_id) == ("no live worker serves model tiny",)
    store.register_worker(db, WorkerInfo("w", "host", 1, "other", "cpu", 2))
    assert reasons(db, job_id) == ("no live worker serves model tiny",)
    store.register_worker(db, WorkerInfo("w2", "host", 1, "tiny", "cpu", 2))
    assert reasons(db, job_id) == ()
    run(db, "UPDATE workers SET seen_at = '2020-01-01 00:00:00'")
    assert reasons(db, job_id) == ("no live worker serves model tiny",)


def test_all_slots_are_busy(served: Database) -> None:
    store.insert_job(served, small_plan(3, (0,), name="above", priority=1))
    job_id = store.insert_job(served, small_plan(2, (0,), name="below"))
    store.insert_job(served, small_plan(2, (0,), name="beside"))
    assert reasons(served, job_id) == ()
    claim_some(served, 2)
    said = "all 2 slots are busy, 1 requests are ahead, shared with 1 jobs of the same priority"
    assert reasons(served, job_id) == (said,)


def test_a_worker_says_that_its_slots_are_busy(served: Database) -> None:
    job_id = store.insert_job(served, small_plan(2, (0,), n=2))
    claim_some(served, 2)
    assert reasons(served, job_id) == ()
    store.see_worker(served, "w", slots_used=2)
    assert reasons(served, job_id) == ("all 2 slots are busy, 0 requests are ahead",)


def test_paused_limited_delayed_suspected(served: Database) -> None:
    job_id = store.insert_job(served, small_plan(5, (0,), limits="max_parallel: 1"))
    (first,) = claim_some(served)
    assert reasons(served, job_id) == ("over its limit max_parallel 1",)
    store.pause_job(served, job_id)
    assert reasons(served, job_id) == ("paused",)
    store.resume_job(served, job_id)
    store.release(served, pairs([first]), error=("x", "y"), delay=True)
    (second,) = claim_some(served)
    store.release_worker(served, "w")
    run(
        served,
        "UPDATE requests SET retry_at = '2040-02-03 04:05:06+00' WHERE retry_at > '2000-1-1'"
        if served.dialect == "postgresql"
        else "UPDATE requests SET retry_at = '2040-02-03 04:05:06.000' WHERE retry_at > '2000'",
    )
    assert reasons(served, job_id) == (
        "waiting for retry at 2040-02-03 04:05:06 UTC (1 requests)",
        "1 requests that may have stopped a worker are tried one at a time",
    )
    assert second.request_id != first.request_id


def test_until_it_is_planned_it_does_not_exist(db: Database) -> None:
    job_id = store.insert_job(db, small_plan())
    run(db, "UPDATE jobs SET planned_at = NULL")
    for read in (views.waiting, views.job, views.find_job):
        with pytest.raises(NotFound):
            read(db, job_id)


def test_what_has_ended_or_all_runs_waits_for_nothing(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(1, (0,)))
    claim_some(db)
    assert reasons(db, job_id) == ()
    cancelled = store.insert_job(db, small_plan())
    store.cancel_job(db, cancelled)
    assert reasons(db, cancelled) == ()
    with pytest.raises(NotFound):
        views.waiting(db, "job_none")


def test_queue_depths(db: Database) -> None:
    assert views.queue_depths(db) == {}
    first = store.insert_job(db, small_plan(3, (0,)))
    store.insert_job(db, small_plan(2, (0,), model="other"))
    store.insert_job(db, small_plan(4, (0,)))
    run(db, f"UPDATE jobs SET planned_at = '2020-01-01 00:00:00' WHERE id = '{first}'")
    claims = claim_some(db, 3)
    depths = views.queue_depths(db)
    assert [(d.model, d.queued, d.running) for d in depths.values()] == [
        ("other", 2, 0),
        ("tiny", 4, 3),
    ]
    oldest = depths["tiny"].oldest_waiting_seconds
    assert oldest is not None and oldest > 365 * 86400
    store.cancel_job(db, first)
    assert views.queue_depths(db)["tiny"].queued == 4 - 1
    over = [write(c, 0, (1,), "", end="stop", outcome="succeeded") for c in claims]
    flush(db, over, lease_seconds=60)
    assert views.queue_depths(db)["tiny"].running == 0


def test_a_model_without_queued_requests_has_no_oldest(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    claim_some(db)
    depth = views.queue_depths(db)["tiny"]
    assert (depth.queued, depth.running, depth.oldest_waiting_seconds) == (0, 1, None)
