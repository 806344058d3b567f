"""Transitions of jobs, workers and scores."""

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import ScoreWrite, WorkerInfo, flush
from orchestrator.errors import Conflict, NotFound
from tests.orchestrator.db.builders import claim_some, rows, small_plan, write


def finish(db: Database, *outcomes: str) -> None:
    """End the next requests so."""
    for claimed, outcome in zip(claim_some(db, len(outcomes)), outcomes, strict=True):
        error = ("template", "no column b") if outcome == "failed" else None
        end = None if error else "stop"
        part = write(claimed, 0, (1,), "a", end=end, whole="a", outcome=outcome, error=error)
        flush(db, [part], lease_seconds=60)


@pytest.mark.parametrize(
    "outcomes, state",
    [
        ((), "queued"),
        (("succeeded",), "running"),
        (("succeeded", "succeeded"), "succeeded"),
        (("failed", "failed"), "failed"),
        (("failed", "succeeded"), "partial"),
    ],
)
def test_a_jobs_state_follows_its_requests(
    db: Database, outcomes: tuple[str, ...], state: str
) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,)))
    finish(db, *outcomes)
    status = views.job_status(db, job_id)
    assert status.state == state
    assert (status.finished_at is not None) == (len(outcomes) == 2)


def test_pause_and_resume(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,)))
    store.pause_job(db, job_id)
    paused_at = views.job(db, job_id).paused_at
    store.pause_job(db, job_id)
    assert views.job(db, job_id).paused_at == paused_at
    assert views.job_status(db, job_id).state == "paused"
    store.resume_job(db, job_id)
    store.resume_job(db, job_id)
    assert views.job_status(db, job_id).state == "queued"


def test_cancel_keeps_what_has_ended(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(3, (0,)))
    finish(db, "succeeded")
    store.pause_job(db, job_id)
    store.cancel_job(db, job_id)
    status = views.job_status(db, job_id)
    assert (status.state, status.succeeded, status.cancelled) == ("cancelled", 1, 2)
    for refused in (store.cancel_job, store.pause_job):
        with pytest.raises(Conflict, match="cancelled already"):
            refused(db, job_id)
    for refused in (store.resume_job, store.retry_failed):
        with pytest.raises(Conflict, match="cancelled"):
            refused(db, job_id)


def test_a_finished_job_cannot_be_cancelled(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(1, (0,)))
    finish(db, "succeeded")
    for refused in (store.cancel_job, store.pause_job):
        with pytest.raises(Conflict, match="finished already"):
            refused(db, job_id)


def test_transitions_of_an_unknown_job(db: Database) -> None:
    for transition in (
        store.cancel_job,
        store.pause_job,
        store.resume_job,
        store.retry_failed,
        views.job,
        views.job_status,
        views.points_summary,
    ):
        with pytest.raises(NotFound, match="job 'job_none' does not exist"):
            transition(db, "job_none")


def test_retry_takes_the_failed_ones_only(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(3, (0,)))
    finish(db, "failed", "succeeded", "failed")
    assert store.retry_failed(db, job_id) == 2
    status = views.job_status(db, job_id)
    assert (status.queued, status.succeeded, status.failed) == (2, 1, 0)
    first, _ = claim_some(db)
    assert (first.attempt, first.choices[0].token_ids.tolist()) == (2, [1])
    assert views.request(db, first.request_id).error_code is None


def test_workers_come_are_seen_and_leave(db: Database) -> None:
    worker = WorkerInfo("host:1", "host", 1, "tiny", "cpu", 8)
    store.register_worker(db, worker)
    store.register_worker(db, WorkerInfo("host:2", "host", 2, "tiny", "cpu", 8))
    assert [w.id for w in views.live_workers(db)] == ["host:1", "host:2"]
    with db.write() as tx:
        tx.exec_driver_sql("UPDATE workers SET seen_at = started_at WHERE id = 'host:1'")
    assert views.live_workers(db, alive_seconds=-1) == []
    assert [w.alive for w in views.workers(db)] == [True, True]
    store.see_worker(db, "host:1")
    store.stop_worker(db, "host:1")
    assert [w.id for w in views.workers(db)] == ["host:2"]
    store.register_worker(db, worker)
    assert len(views.workers(db)) == 2


def test_scores_replace_each_other(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,), n=2))
    for claimed in claim_some(db):
        for choice in (0, 1):
            outcome = "succeeded" if choice else None
            part = write(
                claimed, 0, (1,), "a", choice=choice, end="stop", whole="a", outcome=outcome
            )
            flush(db, [part], lease_seconds=60)
    gaps = list(views.ungraded(db, job_id, ["correct", "short"], page=1))
    assert [(g.request_id, g.choice) for g in gaps] == [
        (10**9, 0),
        (10**9, 1),
        (10**9 + 1, 0),
        (10**9 + 1, 1),
    ]
    assert (gaps[2].text, gaps[2].columns) == ("a", {"a": 1})
    assert gaps[0].graders == ("correct", "short")
    store.insert_scores(db, [])
    store.insert_scores(
        db,
        [ScoreWrite(g.request_id, g.choice, "correct", 0.5, "d\0") for g in gaps]
        + [ScoreWrite(10**9, 0, "short", 1.0)],
    )
    store.insert_scores(db, [ScoreWrite(10**9, 0, "correct", 1.0)])
    left = list(views.ungraded(db, job_id, ["correct", "short"]))
    assert [g.graders for g in left] == [("short",)] * 3
    assert list(views.ungraded(db, job_id, ["correct"])) == []
    assert list(views.ungraded(db, job_id, [])) == []
    (point,) = views.points_summary(db, job_id)
    assert point.scores == {
        "correct": [(0, 1.0), (0, 0.5), (1, 0.5), (1, 0.5)],
        "short": [(0, 1.0)],
    }
    assert rows(db, "SELECT count(*) FROM scores") == [(5,)]
