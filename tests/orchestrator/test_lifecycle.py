"""Submit, cancel, pause, resume, retry: rows first, then the nudge; on both databases."""

from collections.abc import Iterator

import pytest

from orchestrator import lifecycle
from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.errors import Conflict, NotFound
from orchestrator.queue import WAKE, Queue, model_queue
from orchestrator.settings import Settings
from tests.nudges import embedded_queue, taken
from tests.orchestrator.db.builders import claim_some, small_plan, write

TINY = model_queue("tiny")


@pytest.fixture
def queue() -> Iterator[Queue]:
    made = embedded_queue(TINY)
    yield made
    made.close()


def test_submit_writes_and_then_nudges(db: Database, queue: Queue) -> None:
    job_id = lifecycle.submit(db, small_plan(), queue)
    assert taken(queue, TINY) == [(WAKE, ["tiny"])]
    assert views.job_status(db, job_id).state == "queued"
    assert len(claim_some(db)) == 4


def test_a_broker_that_is_away_costs_the_job_nothing(sqlite_db: Database) -> None:
    away = Queue(Settings(broker_url="redis://127.0.0.1:1/0"))
    job_id = lifecycle.submit(sqlite_db, small_plan(), away)
    assert len(claim_some(sqlite_db)) == 4
    store.release_worker(sqlite_db, "w")
    lifecycle.pause(sqlite_db, job_id)
    lifecycle.resume(sqlite_db, job_id, away)
    away.close()


def test_cancel_ends_what_is_queued_and_tells_what_runs(db: Database, queue: Queue) -> None:
    job_id = lifecycle.submit(db, small_plan(), queue)
    (running, *_) = claim_some(db, 1)
    lifecycle.cancel(db, job_id, "wrong prompt")
    found = views.job_status(db, job_id)
    assert (found.running, found.cancelled, found.cancel_reason) == (1, 3, "wrong prompt")
    flushed = store.flush(db, [write(running, 0, (5, 6), "half")], lease_seconds=60)
    assert flushed.cancelled == {running.request_id}
    store.release(db, [(running.request_id, running.epoch)])
    found = views.job_status(db, job_id)
    assert (found.state, found.cancelled) == ("cancelled", 4)
    with pytest.raises(Conflict, match="cancelled already"):
        lifecycle.cancel(db, job_id)
    with pytest.raises(Conflict, match="cancelled"):
        lifecycle.retry(db, job_id, queue)


def test_a_paused_job_is_not_claimed_until_it_is_resumed(db: Database, queue: Queue) -> None:
    job_id = lifecycle.submit(db, small_plan(), queue)
    lifecycle.pause(db, job_id)
    assert views.job_status(db, job_id).state == "paused" and claim_some(db) == []
    taken(queue, TINY)
    lifecycle.resume(db, job_id, queue)
    assert taken(queue, TINY) == [(WAKE, ["tiny"])]
    assert len(claim_some(db)) == 4


def test_retry_queues_what_failed_and_nothing_else(db: Database, queue: Queue) -> None:
    job_id = lifecycle.submit(db, small_plan(), queue)
    first, *others = claim_some(db)
    ends = [
        write(each, 0, (7,), "0", end="stop", whole="0", outcome="succeeded") for each in others
    ]
    bad = write(first, 0, (7,), "0", outcome="failed", error=("poison", "why not"))
    assert not store.flush(db, [bad, *ends], lease_seconds=60).lost
    taken(queue, TINY)
    assert lifecycle.retry(db, job_id, queue) == 1
    assert taken(queue, TINY) == [(WAKE, ["tiny"])]
    (again,) = claim_some(db)
    assert again.request_id == first.request_id
    assert again.choices[0].token_ids.tolist() == [7], "what it had generated is kept"
    assert lifecycle.retry(db, job_id, queue) == 0 and taken(queue, TINY) == []


def test_an_unknown_job_is_not_found(db: Database, queue: Queue) -> None:
    for steer in (lifecycle.cancel, lifecycle.pause):
        with pytest.raises(NotFound):
            steer(db, "job_none")
    with pytest.raises(NotFound):
        lifecycle.retry(db, "job_none", queue)
    with pytest.raises(NotFound):
        lifecycle.resume(db, "job_none", queue)
