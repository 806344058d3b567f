"""What was left behind is found, once, however many look at once; on both databases."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator import lifecycle, reconciler
from orchestrator.db import leftovers, store, views
from orchestrator.db.database import Database
from orchestrator.errors import WorkerError
from orchestrator.queue import GRADE, ORCHESTRATOR_QUEUE, WAKE, Queue, model_queue
from orchestrator.reconciler import Reconciled, ReconcilerThread, looks_every, reconcile
from tests.nudges import embedded_queue, taken
from tests.orchestrator.db.builders import claim_some, small_plan, write

TINY = model_queue("tiny")


@pytest.fixture
def queue() -> Iterator[Queue]:
    made = embedded_queue(TINY, model_queue("other"), ORCHESTRATOR_QUEUE)
    yield made
    made.close()


def live_worker(db: Database, id: str = "w", model: str = "tiny") -> None:
    store.register_worker(db, store.WorkerInfo(id, "host", 1, model, "cpu", 4))


def sql(db: Database, statement: str, **values: Any) -> int:
    with db.write() as tx:
        return tx.execute(text(statement), values).rowcount


def ago(db: Database, seconds: int) -> str:
    if db.dialect == "sqlite":
        return f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{seconds} seconds')"
    return f"now() - interval '{seconds} seconds'"


def states(db: Database, job_id: str) -> list[str]:
    return [request.state for request in views.requests(db, job_id)]


def finished_job(db: Database, plan: Any = None) -> str:
    """A job whose requests have all succeeded with the text "0"; nothing is scored."""
    job_id = store.insert_job(db, plan or small_plan())
    done = [
        write(claimed, 0, (7,), "0", end="stop", whole="0", outcome="succeeded")
        for claimed in claim_some(db)
    ]
    assert not store.flush(db, done, lease_seconds=60).lost
    return job_id


def test_where_nothing_was_left_behind_nothing_happens(db: Database, queue: Queue) -> None:
    assert reconcile(db, queue) == Reconciled()
    job_id = store.insert_job(db, small_plan())
    claim_some(db)
    assert reconcile(db, queue) == Reconciled()
    assert set(states(db, job_id)) == {"running"}


def test_dead_leases_are_released_and_the_model_is_woken(db: Database, queue: Queue) -> None:
    job_id = store.insert_job(db, small_plan())
    live_worker(db)
    claim_some(db)
    sql(db, f"UPDATE requests SET leased_until = {ago(db, 1)}")
    found = reconcile(db, queue)
    assert (found.released, found.woken) == (4, ("tiny",))
    assert set(states(db, job_id)) == {"queued"}
    assert taken(queue, TINY) == [(WAKE, ["tiny"])]
    assert reconcile(db, queue) == Reconciled(woken=("tiny",)), "it still waits, and is nudged"


def test_only_models_that_a_live_worker_serves_are_woken(db: Database, queue: Queue) -> None:
    store.insert_job(db, small_plan())
    other = store.insert_job(db, small_plan(model="other"))
    assert reconcile(db, queue).woken == ()
    live_worker(db, model="other")
    assert reconcile(db, queue).woken == ("other",)
    store.pause_job(db, other)
    assert reconcile(db, queue).woken == (), "a paused job wakes nobody"
    assert taken(queue, TINY) == [] and len(taken(queue, model_queue("other"))) == 1


def test_what_is_past_its_deadline_is_cancelled(db: Database, queue: Queue) -> None:
    job_id = store.insert_job(db, small_plan())
    (claimed, *_) = claim_some(db, 1)
    sql(db, f"UPDATE jobs SET deadline_at = {ago(db, 1)}")
    assert reconcile(db, queue).cancelled == 1
    assert sorted(states(db, job_id)) == ["cancelled"] * 3 + ["running"]
    flushed = store.flush(db, [write(claimed, 0, (7,), "x")], lease_seconds=60)
    assert flushed.cancelled == {claimed.request_id}
    store.release(db, [(claimed.request_id, claimed.epoch)])
    assert set(states(db, job_id)) == {"cancelled"}
    assert {r.error_code for r in views.requests(db, job_id)} == {"deadline"}
    assert reconcile(db, queue).cancelled == 0


def test_a_worker_not_seen_is_forgotten_and_its_claims_come_back(
    db: Database, queue: Queue
) -> None:
    job_id = store.insert_job(db, small_plan())
    live_worker(db, "gone")
    live_worker(db, "here")
    claim_some(db, 2, worker="gone")
    claim_some(db, 2, worker="here")
    sql(db, f"UPDATE workers SET seen_at = {ago(db, 3600)} WHERE id = 'gone'")
    found = reconcile(db, queue)
    assert found.forgotten == 1
    assert sorted(states(db, job_id)) == ["queued"] * 2 + ["running"] * 2
    assert [worker.id for worker in views.workers(db)] == ["here"]


def test_a_job_whose_planning_was_interrupted_is_removed(db: Database, queue: Queue) -> None:
    half, whole, begun = (store.insert_job(db, small_plan()) for _ in range(3))
    long_ago = f"UPDATE jobs SET created_at = {ago(db, 2 * 24 * 3600)}"
    sql(db, f"{long_ago}, planned_at = NULL WHERE id = :id", id=half)
    sql(db, f"{long_ago} WHERE id = :id", id=whole)
    sql(db, "UPDATE jobs SET planned_at = NULL WHERE id = :id", id=begun)
    assert reconcile(db, queue).removed == 1
    with db.read() as rows:
        assert set(rows.scalars(text("SELECT id FROM jobs"))) == {whole, begun}
        left = "SELECT count(*) FROM requests WHERE job_id = :id"
        assert rows.scalar(text(left), {"id": half}) == 0


def test_a_job_that_ended_unscored_is_graded_once(db: Database, queue: Queue) -> None:
    job_id = finished_job(db)
    live_worker(db)
    assert reconcile(db, queue).ungraded == (job_id,)
    assert taken(queue, ORCHESTRATOR_QUEUE) == [(GRADE, [job_id])]
    assert lifecycle.grade(db, job_id) == 4  # what the nudge leads to
    assert reconcile(db, queue) == Reconciled()


def test_without_any_worker_it_is_graded_here(db: Database, queue: Queue) -> None:
    job_id = finished_job(db)
    assert reconcile(db, queue).ungraded == (job_id,)
    assert list(views.ungraded(db, job_id, ["correct"])) == []
    assert taken(queue, ORCHESTRATOR_QUEUE) == []
    assert reconcile(db, queue) == Reconciled()


def test_what_begins_again_is_not_graded_for_good(db: Database, queue: Queue) -> None:
    job_id = finished_job(db)
    sql(db, "UPDATE requests SET state = 'failed' WHERE id = (SELECT min(id) FROM requests)")
    lifecycle.grade(db, job_id)
    assert leftovers.ungraded_jobs(db) == ()
    assert store.retry_failed(db, job_id) == 1
    assert leftovers.ungraded_jobs(db) == (), "it has not ended"
    lifecycle.grade(db, job_id)
    sql(db, "UPDATE requests SET state = 'succeeded' WHERE state = 'queued'")
    assert leftovers.ungraded_jobs(db) == (job_id,), "nor was it marked while it was open"


def test_what_ends_while_others_are_scored_is_asked_for_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = store.insert_job(db, small_plan())
    last, *others = claim_some(db)
    ended = [
        write(each, 0, (7,), "0", end="stop", whole="0", outcome="succeeded")
        for each in (last, *others)
    ]
    store.flush(db, ended[1:], lease_seconds=60)
    insert_scores = store.insert_scores

    def insert_and_end(db: Database, scores: Any) -> None:
        insert_scores(db, scores)
        assert not store.flush(db, ended[:1], lease_seconds=60).lost

    monkeypatch.setattr(store, "insert_scores", insert_and_end)
    assert lifecycle.grade(db, job_id) == 3
    assert leftovers.ungraded_jobs(db) == (job_id,)
    monkeypatch.undo()
    assert lifecycle.grade(db, job_id) == 1
    assert leftovers.ungraded_jobs(db) == ()


def test_only_a_job_at_its_end_is_marked(db: Database) -> None:
    job_id = store.insert_job(db, small_plan())
    leftovers.mark_graded(db, job_id)
    sql(db, "UPDATE requests SET state = 'succeeded'")
    assert leftovers.ungraded_jobs(db) == (job_id,)


def test_any_number_at_once_release_each_request_once(db: Database, queue: Queue) -> None:
    store.insert_job(db, small_plan(25))
    live_worker(db)
    live_worker(db, "gone")
    begun = [write(claimed, 0, (7,), "x") for claimed in claim_some(db, worker="gone")]
    assert not store.flush(db, begun, lease_seconds=60).lost
    sql(db, f"UPDATE requests SET leased_until = {ago(db, 1)}")
    sql(db, f"UPDATE workers SET seen_at = {ago(db, 3600)} WHERE id = 'gone'")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: reconcile(db, queue), range(4)))
    assert sum(each.forgotten for each in found) == 1
    # Those of a forgotten worker come back with it, the others by their lease: never twice.
    assert sum(each.released for each in found) in (0, 50)
    again = claim_some(db)
    assert len(again) == 50 and {claimed.epoch for claimed in again} == {2}


def test_the_thread_outlives_a_database_that_is_away(
    sqlite_db: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    seen = threading.Event()

    def away(db: Database, queue: Queue) -> Reconciled:
        looks.append(1)
        if len(looks) == 1:
            raise WorkerError("database", "away")
        if len(looks) == 2:
            raise RuntimeError("a bug")
        seen.set()
        return Reconciled()

    monkeypatch.setattr(reconciler, "reconcile", away)
    monkeypatch.setattr(reconciler, "_LEAST_SECONDS", 0.01)
    thread = ReconcilerThread(sqlite_db, queue, interval_seconds=0.01)
    thread.start()
    assert seen.wait(30)
    thread.stop()
    assert not thread.is_alive()


def test_a_nudge_makes_it_look_soon_and_many_make_one_look(
    sqlite_db: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = threading.Semaphore(0)

    def look(db: Database, queue: Queue) -> Reconciled:
        looks.release()
        return Reconciled()

    monkeypatch.setattr(reconciler, "reconcile", look)
    thread = ReconcilerThread(sqlite_db, queue, interval_seconds=3600)
    thread.start()
    assert looks.acquire(timeout=30)
    for _ in range(100):
        thread.nudge()
    assert looks.acquire(timeout=30), "an hour would be too long"
    assert not looks.acquire(timeout=0.3)
    thread.stop()
    assert not thread.is_alive()


def test_it_looks_twice_within_a_lease_at_least(
    sqlite_db: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (looks_every(30), looks_every(10), looks_every(2)) == (5, 5, 1)
    looks = threading.Semaphore(0)

    def look(db: Database, queue: Queue) -> Reconciled:
        looks.release()
        return Reconciled()

    monkeypatch.setattr(reconciler, "reconcile", look)
    thread = ReconcilerThread(sqlite_db, queue, lease_seconds=0.2, interval_seconds=3600)
    thread.start()
    for _ in range(3):
        assert looks.acquire(timeout=30), "an hour would be too long"
    thread.stop()


def test_a_thread_that_was_stopped_before_its_start_is_no_error(
    sqlite_db: Database, queue: Queue
) -> None:
    ReconcilerThread(sqlite_db, queue).stop()
