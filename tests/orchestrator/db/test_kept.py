"""Kept totals of points are told while they are true, and never afterwards."""

from orchestrator.db import kept, leftovers, store, views
from orchestrator.db.database import Database
from orchestrator.db.points import counted, planned_points
from orchestrator.db.store import flush
from tests.orchestrator.db.builders import claim_some, rows, run, small_plan, write


def graded(db: Database) -> tuple[str, list[store.Claimed]]:
    """A job that has ended, of three items at four points: each fourth request has failed."""
    job_id = store.insert_job(db, small_plan(3, (0, 1, 1.5, 2)))
    claimed = claim_some(db, 12)
    for k, one in enumerate(claimed):
        failed = k % 4 == 0
        end, outcome = (None, "failed") if failed else ("stop", "succeeded")
        error = ("a", "why") if failed else None
        done = write(one, 0, (1,) * (k + 1), "a", end=end, outcome=outcome, error=error)
        flush(db, [done], lease_seconds=60)
    score(db, claimed, 0.25)
    leftovers.mark_graded(db, job_id)
    return job_id, claimed


def score(db: Database, claimed: list[store.Claimed], by: float) -> None:
    scores = [
        store.ScoreWrite(one.request_id, 0, "correct", by * k) for k, one in enumerate(claimed)
    ]
    store.insert_scores(db, scores)


def true(db: Database, job_id: str) -> bool:
    """Whether what is told is what a full count gives."""
    with db.read() as tx:
        whole = counted(tx, planned_points(tx, job_id))
    told = [*views.points_page(db, job_id, limit=3), *views.points_page(db, job_id, after=2)]
    return told == whole == views.points_page(db, job_id)


def uses_kept(db: Database, job_id: str) -> bool:
    """Whether what is told comes from the kept rows: one is changed by hand."""
    run(db, "UPDATE point_totals SET prompt_tokens = prompt_tokens + 1000")
    used = views.points_page(db, job_id)[0].prompt_tokens >= 1000
    run(db, "UPDATE point_totals SET prompt_tokens = prompt_tokens - 1000")
    return used


def test_what_is_kept_is_what_a_full_count_gives(db: Database) -> None:
    job_id, _ = graded(db)
    assert kept.keep_points(db, job_id) == 0  # too small to be worth it
    assert not uses_kept(db, job_id)
    assert kept.keep_points(db, job_id, least=1) == 4
    assert uses_kept(db, job_id)
    assert true(db, job_id)


def test_a_job_that_is_not_graded_is_counted(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(3, (0, 1)))
    assert kept.keep_points(db, job_id, least=1) == 0
    assert true(db, job_id)


def test_other_scores_are_told_at_once_and_kept_anew(db: Database) -> None:
    job_id, claimed = graded(db)
    kept.keep_points(db, job_id, least=1)
    score(db, claimed, 0.5)
    assert not uses_kept(db, job_id)
    assert true(db, job_id)
    assert leftovers.ungraded_jobs(db) == (job_id,)
    leftovers.mark_graded(db, job_id)
    assert kept.keep_points(db, job_id, least=1) == 4
    assert uses_kept(db, job_id)
    assert true(db, job_id)


def test_a_retried_job_is_counted_and_kept_anew_at_its_next_end(db: Database) -> None:
    job_id, _ = graded(db)
    kept.keep_points(db, job_id, least=1)
    assert store.retry_failed(db, job_id) == 3
    assert not uses_kept(db, job_id)
    assert true(db, job_id)
    for one in claim_some(db, 12):
        stored = len(one.choices[0].token_ids)
        done = write(one, stored, (1,), "b", end="stop", outcome="succeeded")
        assert not flush(db, [done], lease_seconds=60).lost
        assert true(db, job_id)
    leftovers.mark_graded(db, job_id)
    assert kept.keep_points(db, job_id, least=1) == 4
    assert uses_kept(db, job_id)
    assert true(db, job_id)


def test_a_cancelled_job_is_counted(db: Database) -> None:
    job_id, _ = graded(db)
    kept.keep_points(db, job_id, least=1)
    before = rows(db, "SELECT point_id, version FROM point_totals ORDER BY 1")
    store.retry_failed(db, job_id)
    store.cancel_job(db, job_id)
    leftovers.mark_graded(db, job_id)  # ended again, and yet another end
    assert rows(db, "SELECT point_id, version FROM point_totals ORDER BY 1") == before
    assert not uses_kept(db, job_id)
    assert true(db, job_id)
