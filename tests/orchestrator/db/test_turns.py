"""Whose turn it is: priority first, then shares; limits hold whoever claims beside."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.db.store import Claimed, claim, flush
from orchestrator.db.tables import ROWS_PER_JOB
from tests.orchestrator.db.builders import claim_some, pairs, rows, small_plan, write


def numbers(claims: list[Claimed]) -> list[int]:
    """The number of each claim's job."""
    return [claimed.request_id // ROWS_PER_JOB for claimed in claims]


def finish(db: Database, claims: list[Claimed]) -> None:
    ends = [write(c, 0, (1,), "a", end="stop", whole="a", outcome="succeeded") for c in claims]
    flush(db, ends, lease_seconds=60)


def test_a_small_job_shares_with_a_huge_one(db: Database) -> None:
    store.insert_job(db, small_plan(500, (0,), name="huge"))
    before = claim_some(db, 8)
    store.insert_job(db, small_plan(20, (0,), name="small"))
    assert Counter(numbers(before)) == {1: 8}
    # The late one catches up first, then both get the same.
    assert Counter(numbers(claim_some(db, 8))) == {2: 8}
    assert Counter(numbers(claim_some(db, 8))) == {1: 4, 2: 4}
    # Eight are left of the small one; the huge one takes what that leaves.
    assert Counter(numbers(claim_some(db, 20))) == {1: 12, 2: 8}
    assert Counter(numbers(claim_some(db, 8))) == {1: 8}


def test_with_one_slot_jobs_take_turns(db: Database) -> None:
    """Among jobs with equally many running, the one that waited longest is next."""
    for name in ("a", "b", "c"):
        store.insert_job(db, small_plan(4, (0,), name=name))
    served: list[int] = []
    while got := claim_some(db, 1):
        served += numbers(got)
        finish(db, got)
        if len(served) == 5:
            store.insert_job(db, small_plan(2, (0,), name="late"))
    assert served == [1, 2, 3, 1, 2, 4, 3, 1, 2, 4, 3, 1, 2, 3]


def test_with_fewer_slots_than_jobs_none_starves(db: Database) -> None:
    for k in range(7):
        store.insert_job(db, small_plan(30, (0,), name=f"j{k}"))
    first = Counter(number for _ in range(7) for number in numbers(_claim_and_finish(db, 3)))
    assert first == dict.fromkeys(range(1, 8), 3)


def _claim_and_finish(db: Database, limit: int) -> list[Claimed]:
    got = claim_some(db, limit)
    finish(db, got)
    return got


def test_shares_are_of_what_runs(db: Database) -> None:
    """A job whose requests take long does not get more slots by that."""
    store.insert_job(db, small_plan(50, (0,), name="long"))
    store.insert_job(db, small_plan(50, (0,), name="short"))
    running = claim_some(db, 8)
    for _ in range(6):
        short = [c for c in running if c.request_id // ROWS_PER_JOB == 2]
        finish(db, short)
        running = [c for c in running if c not in short] + claim_some(db, len(short))
        assert Counter(numbers(running)) == {1: 4, 2: 4}


def test_inside_a_job_the_order_is_kept_and_a_sweep_stays_together(db: Database) -> None:
    for name in ("a", "b"):
        store.insert_job(db, small_plan(6, (0, 0.5, 1), name=name))
    seen: dict[str, list[int]] = {}
    while got := claim_some(db, 6):
        for claimed in got:
            seen.setdefault(claimed.job_id, []).append(claimed.request_id % ROWS_PER_JOB)
        # Both of the job's items are whole, or the next claim goes on where this one ended.
        assert numbers(got) == sorted(numbers(got))
    assert list(seen.values()) == [list(range(18))] * 2


def test_higher_priority_goes_first_and_alone(db: Database) -> None:
    store.insert_job(db, small_plan(4, (0,), name="low"))
    store.insert_job(db, small_plan(3, (0,), name="high", priority=1))
    store.insert_job(db, small_plan(2, (0,), name="highest", priority=2))
    assert numbers(claim_some(db, 4)) == [3, 3, 2, 2]
    assert numbers(claim_some(db, 4)) == [2, 1, 1, 1]
    assert numbers(claim_some(db, 4)) == [1]


def test_a_wide_request_waits_for_room(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,), name="wide", n=4))
    store.insert_job(db, small_plan(9, (0,), name="narrow"))
    assert numbers(claim_some(db, 6)) == [1, 2]
    assert numbers(claim_some(db, 4)) == [1]
    assert numbers(claim_some(db, 4)) == [2] * 4


def test_one_job_alone(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,), name="other", priority=9))
    mine = store.insert_job(db, small_plan(2, (0,), name="mine"))
    got = claim(db, model="tiny", worker_id="w", limit=9, lease_seconds=60, job_id=mine)
    assert numbers(got) == [2, 2]


def test_max_parallel_is_kept(db: Database) -> None:
    store.insert_job(db, small_plan(10, (0,), name="limited", limits="max_parallel: 3"))
    first = claim_some(db, 2)
    assert len(first) == 2
    second = claim_some(db, 8)
    assert len(second) == 1
    assert claim_some(db, 8) == []
    finish(db, first)
    assert len(claim_some(db, 8)) == 2
    store.release(db, pairs(second))
    assert len(claim_some(db, 8)) == 1


def test_what_a_limit_leaves_goes_to_others(db: Database) -> None:
    store.insert_job(db, small_plan(9, (0,), name="a", limits="max_parallel: 1", priority=1))
    store.insert_job(db, small_plan(9, (0,), name="b", limits="max_parallel: 2", priority=1))
    store.insert_job(db, small_plan(9, (0,), name="c"))
    assert Counter(numbers(claim_some(db, 8))) == {1: 1, 2: 2, 3: 5}
    assert Counter(numbers(claim_some(db, 2))) == {3: 2}


def test_max_parallel_is_kept_among_many_claimers(db: Database) -> None:
    for name in ("a", "b"):
        limits = "max_parallel: 3"
        store.insert_job(db, small_plan(40, (0,), name=name, limits=limits))
    store.insert_job(db, small_plan(40, (0,), name="free"))
    start, too_many = threading.Barrier(6), []

    def work(worker: int) -> int:
        start.wait()
        done = 0
        for _ in range(12):
            got = claim(db, model="tiny", worker_id=f"w{worker}", limit=4, lease_seconds=60)
            running = dict(
                rows(
                    db,
                    "SELECT job_id, count(*) FROM requests WHERE state = 'running' AND job_id IN "
                    "(SELECT id FROM jobs WHERE max_parallel = 3) GROUP BY job_id",
                )
            )
            too_many.extend(count for count in running.values() if count > 3)
            finish(db, got)
            done += len(got)
        return done

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) > 40
    assert too_many == []
    assert rows(db, "SELECT count(*) FROM requests WHERE attempt > 1") == [(0,)]


@pytest.mark.parametrize("column", ["paused_at", "cancelled_at", "deadline_at"])
def test_jobs_that_stopped_are_passed_over(db: Database, column: str) -> None:
    store.insert_job(db, small_plan(3, (0,), name="stopped", priority=1))
    with db.write() as tx:
        tx.exec_driver_sql(f"UPDATE jobs SET {column} = created_at")
    store.insert_job(db, small_plan(3, (0,), name="going"))
    assert numbers(claim_some(db, 9)) == [2, 2, 2]


def test_many_open_and_ended_jobs_are_all_served(db: Database) -> None:
    for k in range(12):
        store.insert_job(db, small_plan(2, (0,), name=f"j{k}", model="tiny" if k % 3 else "other"))
    finish(db, claim_some(db, 8))
    assert Counter(numbers(claim_some(db, 50))) == dict.fromkeys((2, 3, 5, 6, 8, 9, 11, 12), 1)
    assert claim_some(db, 50) == []
