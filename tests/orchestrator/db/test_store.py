"""Transitions of jobs, workers and scores."""

from datetime import UTC, datetime

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import ScoreWrite, WorkerInfo, flush
from orchestrator.errors import Conflict, NotFound
from tests.orchestrator.db.builders import claim_some, rows, run, small_plan, write


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


# Deadlines


def pass_deadline(db: Database) -> None:
    """As if it were later."""
    run(db, "UPDATE jobs SET deadline_at = created_at WHERE deadline_at IS NOT NULL")


def test_a_deadline_counts_from_the_submission(db: Database) -> None:
    for limits, seconds in (("deadline: 90", 90), ("deadline: 1.5h", 5400)):
        job = views.job(db, store.insert_job(db, small_plan(1, (0,), limits=limits)))
        assert job.deadline_at is not None
        assert 0 <= (job.deadline_at - job.created_at).total_seconds() - seconds < 1
    instant = "deadline: '2040-01-31T18:00:00+02:00'"
    job = views.job(db, store.insert_job(db, small_plan(1, (0,), limits=instant)))
    assert job.deadline_at == datetime(2040, 1, 31, 16, tzinfo=UTC)
    assert views.job_status(db, job.id).deadline_at == job.deadline_at


def test_what_has_not_ended_by_the_deadline_is_cancelled(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(4, (0,), limits="deadline: 1h"))
    other = store.insert_job(db, small_plan(1, (0,), name="other"))
    assert store.expire_deadlines(db) == []
    claims = [c for c in claim_some(db, 4) if c.job_id == job_id]
    done, running, back = claims[:3]
    flush(db, [write(done, 0, (1,), "a", end="stop", outcome="succeeded")], lease_seconds=60)
    store.release(db, [(back.request_id, back.epoch)], error=("x", "y"), delay=True)
    pass_deadline(db)
    assert claim_some(db) == []
    assert store.expire_deadlines(db) == [job_id]
    assert store.expire_deadlines(db) == []
    flushed = flush(db, [write(running, 0, (7,), "b")], lease_seconds=60)
    assert flushed.cancelled == {running.request_id}
    status = views.job_status(db, job_id)
    assert (status.state, status.cancel_reason) == ("cancelled", "deadline")
    assert (status.succeeded, status.cancelled) == (1, 3)
    found = [(r.state, r.error_code, r.retry_at) for r in views.requests(db, job_id)]
    assert found == [("succeeded", None, None)] + [("cancelled", "deadline", None)] * 3
    assert views.request(db, running.request_id).n_tokens == 1
    assert views.job_status(db, other).state == "running"


def test_what_ended_in_time_has_met_its_deadline(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(1, (0,), limits="deadline: 1h"))
    finish(db, "succeeded")
    pass_deadline(db)
    assert store.expire_deadlines(db) == []
    assert views.job_status(db, job_id).state == "succeeded"


def test_a_paused_job_has_its_deadline_too(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(1, (0,), limits="deadline: 1h"))
    store.pause_job(db, job_id)
    pass_deadline(db)
    assert store.expire_deadlines(db) == [job_id]
    assert views.job_status(db, job_id).state == "cancelled"


def test_the_first_reason_stays(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,), limits="deadline: 1h"))
    claim_some(db, 1)
    store.cancel_job(db, job_id, "wrong data")
    store.cancel_job(db, job_id, "another")
    pass_deadline(db)
    assert store.expire_deadlines(db) == []
    assert views.job(db, job_id).cancel_reason == "wrong data"
    store.release_worker(db, "w")
    assert [r.error_code for r in views.requests(db, job_id)] == [None, None]
