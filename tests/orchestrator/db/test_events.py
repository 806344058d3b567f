"""Each transition writes its event once, in its own transaction."""

import pytest

from orchestrator.db import leftovers, store, views
from orchestrator.db.database import Database
from orchestrator.db.store import flush
from orchestrator.errors import Conflict
from tests.orchestrator.db.builders import claim_some, pairs, run, small_plan, write


def told(db: Database, job_id: str, after: int = 0) -> list[tuple[str, str | None]]:
    """(event, detail) of all of them."""
    return [(event.event, event.detail) for event in views.events(db, job_id, after=after)]


def test_a_jobs_life_is_told_in_order(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,)))
    assert told(db, job_id) == [("submitted", None)]
    claimed = claim_some(db)
    store.release(db, pairs(claimed))
    for _ in range(2):
        store.pause_job(db, job_id)
    for _ in range(2):
        store.resume_job(db, job_id)
    assert leftovers.note_ended(db) == ()
    failed = [write(c, outcome="failed", error=("x", "y")) for c in claim_some(db)]
    flush(db, failed, lease_seconds=60)
    assert leftovers.note_ended(db) == (job_id,)
    assert leftovers.note_ended(db) == ()
    assert store.retry_failed(db, job_id) == 2
    assert store.retry_failed(db, job_id) == 0
    claim_some(db)
    for _ in range(2):
        store.cancel_job(db, job_id, "enough")
    store.release_worker(db, "w")
    assert leftovers.note_ended(db) == (job_id,)
    assert told(db, job_id) == [
        ("submitted", None),
        ("started", None),
        ("paused", None),
        ("resumed", None),
        ("ended", "failed"),
        ("retried", "2"),
        ("cancelled", "enough"),
        ("ended", "cancelled"),
    ]


def test_a_deadline_is_an_event_of_its_own(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(limits="deadline: 1d"))
    other = store.insert_job(db, small_plan())
    run(db, "UPDATE jobs SET deadline_at = created_at WHERE deadline_at IS NOT NULL")
    store.expire_deadlines(db)
    assert told(db, job_id) == [("submitted", None), ("deadline", None)]
    assert told(db, other) == [("submitted", None)]


def test_what_is_refused_is_no_event(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(1, (0,)))
    store.cancel_job(db, job_id)
    for refused in (store.cancel_job, store.pause_job, store.resume_job, store.retry_failed):
        with pytest.raises(Conflict):
            refused(db, job_id)
    assert told(db, job_id) == [("submitted", None), ("cancelled", None)]


def test_events_page_by_id(db: Database) -> None:
    job_id = store.insert_job(db, small_plan())
    store.pause_job(db, job_id)
    first, second = views.events(db, job_id)
    assert first.at <= second.at
    assert views.events(db, job_id, after=first.id) == [second]
    assert views.events(db, job_id, limit=1) == [first]


def test_a_job_that_had_started_is_not_told_again(db: Database) -> None:
    """As where two claims were first at once, and only one of them noted the turn."""
    job_id = store.insert_job(db, small_plan())
    claim_some(db, 1)
    run(db, "UPDATE turns SET turn = 0")
    claim_some(db, 1)
    assert [event for event, _ in told(db, job_id)] == ["submitted", "started"]
