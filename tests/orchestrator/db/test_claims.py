"""Who gets what: claims exclude each other, count attempts, and come back when nobody renews."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import Claimed, claim, flush
from tests.orchestrator.db.builders import claim_some, rows, small_plan, write


def test_a_claim_brings_all_that_a_worker_needs(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0, 0.5)))
    first, *others = claim_some(db)
    assert first.job_id == job_id
    assert (first.model, first.epoch, first.attempt) == ("tiny", 1, 1)
    assert first.params["messages"] == [{"role": "user", "content": "What is {{ a }}?"}]
    assert (first.point_params, first.columns) == ({"temperature": 0}, {"a": 0})
    assert [c.request_id for c in (first, *others)] == [10**9 + k for k in range(4)]
    assert [(c.columns["a"], c.point_params["temperature"]) for c in others] == [
        (0, 0.5),
        (1, 0),
        (1, 0.5),
    ]
    planned = list(small_plan(2, (0, 0.5)).requests())
    assert [c.seed for c in (first, *others)] == [request.seed for request in planned]
    assert rows(db, "SELECT DISTINCT state, worker_id FROM requests") == [("running", "w")]


def test_order_is_priority_then_job_then_position(db: Database) -> None:
    low = store.insert_job(db, small_plan(1, name="low"))
    high = store.insert_job(db, small_plan(1, name="high", priority=5))
    later = store.insert_job(db, small_plan(1, name="later", priority=5))
    store.insert_job(db, small_plan(1, name="elsewhere", model="other"))
    assert [c.job_id for c in claim_some(db, 5)] == [high, high, later, later, low]
    assert views.claimable(db, "tiny") == 1
    assert views.claimable(db, "other") == 2


def test_the_limit_counts_unfinished_choices(db: Database) -> None:
    store.insert_job(db, small_plan(4, (0,), n=3))
    first, second = claim_some(db, 7)
    ended = [write(first, 0, (k,), "a", choice=k, end="stop", whole="a") for k in (0, 1)]
    for part in ended:
        flush(db, [part], lease_seconds=60)
    store.release(db, [(first.request_id, first.epoch), (second.request_id, second.epoch)])
    assert [c.request_id for c in claim_some(db, 4)] == [first.request_id, second.request_id]


def test_one_request_wider_than_the_limit_is_claimed_all_the_same(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,), n=8))
    assert len(claim_some(db, 4)) == 1
    assert len(claim_some(db, 4)) == 1
    assert claim_some(db, 4) == []


@pytest.mark.parametrize("limit", [0, -1])
def test_no_room_no_claim(db: Database, limit: int) -> None:
    store.insert_job(db, small_plan())
    assert claim_some(db, limit) == []


def test_of_many_claims_at_once_each_request_goes_to_one(db: Database) -> None:
    store.insert_job(db, small_plan(30, (0, 1)))
    start = threading.Barrier(6)

    def work(worker: int) -> list[Claimed]:
        start.wait()
        taken: list[Claimed] = []
        while got := claim(db, model="tiny", worker_id=f"w{worker}", limit=3, lease_seconds=60):
            taken += got
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [c for batch in pool.map(work, range(6)) for c in batch]
    # SKIP LOCKED may leave one worker empty-handed while another still holds the locks.
    taken += claim_some(db)
    assert sorted(c.request_id for c in taken) == [10**9 + k for k in range(60)]
    assert rows(db, "SELECT DISTINCT epoch, attempt FROM requests") == [(1, 1)]


def test_the_fourth_claim_without_a_token_is_poison(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,)))
    poison, survivor = claim_some(db)
    flush(db, [write(survivor, 0, (1,), "a")], lease_seconds=60)
    assert store.release_worker(db, "w") == 2
    for attempt in (2, 3):
        (again,) = claim_some(db)
        assert (again.request_id, again.attempt) == (poison.request_id, attempt)
        assert store.release_worker(db, "w") == 1
    assert [c.request_id for c in claim_some(db)] == [survivor.request_id]
    found = views.request(db, poison.request_id)
    assert (found.state, found.error_code) == ("failed", "poison")
    assert found.error_message == "claimed 3 times without one new token"
    assert found.finished_at is not None


def test_a_token_makes_the_attempts_start_anew(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    for attempt in range(6):
        (claimed,) = claim_some(db)
        assert claimed.attempt == attempt + 1
        if attempt % 2:
            flush(db, [write(claimed, attempt // 2, (1,), "a")], lease_seconds=60)
        store.release_worker(db, "w")


def test_giving_back_on_purpose_is_no_idle_attempt(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    for attempt in range(6):
        (claimed,) = claim_some(db)
        assert (claimed.attempt, claimed.epoch) == (attempt + 1, attempt + 1)
        assert store.release(db, [(claimed.request_id, claimed.epoch)]) == 1


def test_only_the_holder_can_give_back(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    (first,) = claim_some(db)
    store.release(db, [(first.request_id, first.epoch)])
    (second,) = claim_some(db)
    assert store.release(db, [(first.request_id, first.epoch)]) == 0
    assert store.release(db, []) == 0
    assert store.release(db, [(second.request_id, second.epoch)]) == 1
    assert store.release(db, [(second.request_id, second.epoch)]) == 0


def test_expired_leases_return_and_others_stay(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,)))
    (dead,) = claim_some(db, 1, lease=-0.5)
    (alive,) = claim_some(db, 1)
    assert store.release_expired(db) == 1
    assert store.release_expired(db) == 0
    assert views.request(db, dead.request_id).state == "queued"
    assert views.request(db, alive.request_id).state == "running"
    (again,) = claim_some(db)
    assert (again.request_id, again.epoch) == (dead.request_id, 2)


def test_a_dead_workers_requests_return(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,)))
    claim_some(db, 1, worker="dead")
    claim_some(db, 1, worker="alive")
    assert store.release_worker(db, "dead") == 1
    assert rows(db, "SELECT worker_id FROM requests WHERE state = 'running'") == [("alive",)]


def test_what_returns_to_a_cancelled_job_is_cancelled(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(3, (0,)))
    running = claim_some(db, 2, lease=-1)
    store.cancel_job(db, job_id)
    assert store.release(db, [(running[0].request_id, running[0].epoch)]) == 1
    assert store.release_expired(db) == 1
    status = views.job_status(db, job_id)
    assert (status.state, status.cancelled) == ("cancelled", 3)
    assert status.finished_at is not None
    assert claim_some(db) == []


def test_paused_and_half_planned_jobs_are_not_claimed(db: Database) -> None:
    job_id = store.insert_job(db, small_plan())
    store.pause_job(db, job_id)
    assert claim_some(db) == []
    store.resume_job(db, job_id)
    with db.write() as tx:
        tx.exec_driver_sql("UPDATE jobs SET planned_at = NULL")
    assert claim_some(db) == []
    assert views.claimable(db, "tiny") == 0


def test_a_claim_while_another_job_is_being_cancelled(db: Database) -> None:
    """Cancelling and giving back at once leaves nothing queued in a cancelled job."""
    for _ in range(10):
        job_id = store.insert_job(db, small_plan(4, (0,)))
        held = [(c.request_id, c.epoch) for c in claim_some(db)]
        start = threading.Barrier(2)

        def give_back(pairs: list[tuple[int, int]], start: threading.Barrier) -> None:
            start.wait()
            for pair in pairs:
                store.release(db, [pair])

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(give_back, held, start)
            start.wait()
            store.cancel_job(db, job_id)
            done.result()
        assert views.job_status(db, job_id).cancelled == 4
