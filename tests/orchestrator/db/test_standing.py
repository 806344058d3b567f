"""What is asked of a job all at once is what is asked of it part by part."""

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.errors import NotFound
from tests.orchestrator.db.builders import claim_some, small_plan


def same(db: Database, job_id: str) -> views.Standing:
    """The standing of a job at rest, held against its parts."""
    found = views.standing(db, job_id)
    parts = (views.job_status, views.version, views.pace, views.waiting)
    assert (found.status, found.version, found.pace, found.waiting) == tuple(
        part(db, job_id) for part in parts
    )
    return found


def test_all_at_once_is_part_by_part(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(3, (0,)))
    assert same(db, job_id).waiting.reasons == ("no live worker serves model tiny",)
    store.pause_job(db, job_id)
    assert same(db, job_id).waiting.reasons == ("paused",)
    store.resume_job(db, job_id)
    claim_some(db, 1)
    running = views.standing(db, job_id)
    assert (running.status.state, running.status.running) == ("running", 1)
    store.cancel_job(db, job_id)
    assert views.standing(db, job_id).waiting.reasons == ()


def test_of_an_ended_job_nothing_waits_and_nothing_is_left(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,)))
    store.cancel_job(db, job_id)
    found = same(db, job_id)
    assert (found.status.state, found.pace) == ("cancelled", views.Pace(None, None, 0.0))


def test_a_job_that_is_not_there_stands_nowhere(db: Database) -> None:
    with pytest.raises(NotFound, match="job_nothing"):
        views.standing(db, "job_nothing")
