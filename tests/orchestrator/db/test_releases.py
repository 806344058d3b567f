"""How requests come back: after errors with a growing delay, suspects alone, from lost workers."""

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import Claimed, WorkerInfo, flush
from tests.orchestrator.db.builders import claim_some, pairs, rows, run, small_plan, write

ERROR = ("device", "the device is gone")
DUE = "UPDATE requests SET retry_at = created_at WHERE retry_at IS NOT NULL"


def fail(db: Database, claims: list[Claimed]) -> None:
    assert store.release(db, pairs(claims), error=ERROR, delay=True) == len(claims)


def delay(db: Database, request_id: int) -> float:
    """Seconds from now to the request's next attempt."""
    retry_at = views.request(db, request_id).retry_at
    assert retry_at is not None
    now = "strftime('%Y-%m-%d %H:%M:%f', 'now')" if db.dialect == "sqlite" else "clock_timestamp()"
    ((earlier,),) = rows(db, f"SELECT count(*) FROM requests WHERE retry_at <= {now}")
    assert earlier == 0
    finished = views.request(db, request_id).started_at
    assert finished is not None
    return (retry_at - finished).total_seconds()


def test_an_error_delays_longer_each_time(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,), limits="max_attempts: 1000"))
    wanted = [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    for attempt, seconds in enumerate(wanted, start=1):
        run(db, "UPDATE requests SET started_at = NULL")
        (claimed,) = claim_some(db)
        fail(db, [claimed])
        assert seconds <= delay(db, claimed.request_id) < seconds + 2
        found = views.request(db, claimed.request_id)
        assert (found.state, found.failures, found.error_code) == ("queued", attempt, "device")
        assert claim_some(db) == []
        run(db, DUE)


def test_others_go_on_while_one_waits(db: Database) -> None:
    store.insert_job(db, small_plan(3, (0,)))
    first = claim_some(db, 1)
    fail(db, first)
    assert [c.request_id for c in claim_some(db, 1)] == [first[0].request_id + 1]
    run(db, DUE)
    # Its turn comes back by its place, alone as it has not brought a token yet.
    assert [c.request_id for c in claim_some(db)] == [first[0].request_id]


def test_without_delay_it_is_tried_at_once(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    store.release(db, pairs(claim_some(db)), error=ERROR)
    (again,) = claim_some(db)
    assert again.attempt == 2
    found = views.request(db, again.request_id)
    assert (found.failures, found.error_message) == (1, "the device is gone")


@pytest.mark.parametrize("limits, attempts", [("", 5), ("max_attempts: 2", 2)])
def test_after_so_many_errors_it_has_failed(db: Database, limits: str, attempts: int) -> None:
    job_id = store.insert_job(db, small_plan(1, (0,), limits=limits))
    for _ in range(attempts):
        claims = claim_some(db)
        fail(db, claims)
        run(db, DUE)
    assert claim_some(db) == []
    found = views.request(db, claims[0].request_id)
    assert (found.state, found.error_code, found.retry_at) == ("failed", "worker_error", None)
    assert found.error_message == (
        f"{attempts} attempts in a row ended in an error, the last: device: the device is gone"
    )
    assert found.finished_at is not None
    assert store.retry_failed(db, job_id) == 1
    again = views.request(db, claims[0].request_id)
    assert (again.state, again.failures, again.error_code) == ("queued", 0, None)
    assert len(claim_some(db)) == 1


def test_a_token_makes_the_errors_start_anew(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    for attempt in range(12):
        (claimed,) = claim_some(db)
        if attempt % 3 == 2:
            flush(db, [write(claimed, attempt // 3, (1,), "a")], lease_seconds=60)
            assert views.request(db, claimed.request_id).failures == 0
        fail(db, [claimed])
        run(db, DUE)
    assert views.request(db, claimed.request_id).state == "queued"


def test_the_end_forgets_the_error(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    store.release(db, pairs(claim_some(db)), error=ERROR)
    (claimed,) = claim_some(db)
    over = write(claimed, 0, (1,), "a", end="stop", whole="a", outcome="succeeded")
    flush(db, [over], lease_seconds=60)
    found = views.request(db, claimed.request_id)
    assert (found.state, found.error_code, found.error_message) == ("succeeded", None, None)


def test_errors_in_a_cancelled_job_end_it(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,)))
    claims = claim_some(db, 1)
    store.cancel_job(db, job_id, "not needed any more")
    fail(db, claims)
    found = views.request(db, claims[0].request_id)
    assert (found.state, found.error_code, found.retry_at) == ("cancelled", None, None)
    status = views.job_status(db, job_id)
    assert (status.state, status.cancel_reason) == ("cancelled", "not needed any more")


def test_an_error_text_may_hold_anything(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,), limits="max_attempts: 2"))
    for _ in range(2):
        store.release(db, pairs(claim_some(db)), error=("x", "50% \0 :b '%s'"))
    nul = "\0" if db.dialect == "sqlite" else "\N{REPLACEMENT CHARACTER}"
    message = views.request(db, 10**9).error_message
    assert message == f"2 attempts in a row ended in an error, the last: x: 50% {nul} :b '%s'"


# Suspects: claimed before, without one new token


def crash(db: Database) -> None:
    """The worker is gone with all it holds."""
    store.release_worker(db, "w")


def test_after_a_crash_the_innocent_are_proven_one_by_one(db: Database) -> None:
    """A request that kills whoever computes it, among seven others: it alone fails."""
    store.insert_job(db, small_plan(8, (0,)))
    guilty = 10**9 + 3
    held: dict[int, Claimed] = {}
    crashes = 0
    for _ in range(100):
        got = claim_some(db, 8, alone=not held)
        if not got and not held:
            break
        held |= {c.request_id: c for c in got}
        if guilty in held:
            held, crashes = {}, crashes + 1
            crash(db)
            continue
        for claimed in held.values():
            over = write(claimed, 0, (1,), "a", end="stop", whole="a", outcome="succeeded")
            flush(db, [over], lease_seconds=60)
        held = {}
    states = dict(rows(db, "SELECT id, state FROM requests"))
    assert states.pop(guilty) == "failed"
    assert set(states.values()) == {"succeeded"}
    assert crashes == 3


def test_a_suspect_comes_alone_and_only_to_a_worker_without_others(db: Database) -> None:
    store.insert_job(db, small_plan(5, (0,)))
    suspects = [c.request_id for c in claim_some(db, 2)]
    crash(db)
    fresh = claim_some(db, 2, alone=False)
    assert not {c.request_id for c in fresh} & set(suspects)
    assert not any(c.suspect for c in fresh)
    (first,) = claim_some(db, 8)
    assert (first.request_id, first.suspect) == (suspects[0], True)
    (second,) = claim_some(db, 8)
    assert second.request_id == suspects[1]
    assert [c.request_id for c in claim_some(db, 8)] == [suspects[1] + 3]


def test_a_suspect_that_brings_a_token_is_none_any_more(db: Database) -> None:
    store.insert_job(db, small_plan(3, (0,)))
    claim_some(db, 1)
    crash(db)
    (claimed,) = claim_some(db)
    flush(db, [write(claimed, 0, (1,), "a")], lease_seconds=60)
    store.release(db, pairs([claimed]))
    assert len(claim_some(db, alone=False)) == 3


def test_a_suspect_of_low_priority_waits_for_its_level(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,), name="low"))
    claim_some(db)
    crash(db)
    store.insert_job(db, small_plan(3, (0,), name="high", priority=1))
    assert {c.request_id // 10**9 for c in claim_some(db)} == {2}
    assert [c.request_id // 10**9 for c in claim_some(db)] == [1]


def test_an_error_leaves_a_suspect_but_is_no_poison(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,), limits="max_attempts: 9"))
    first, second = claim_some(db)
    flush(db, [write(second, 0, (1,), "a")], lease_seconds=60)
    fail(db, [first, second])
    run(db, DUE)
    assert [c.request_id for c in claim_some(db, alone=False)] == [second.request_id]
    for _ in range(6):
        (alone,) = claim_some(db)
        assert alone.request_id == first.request_id
        fail(db, [alone])
        run(db, DUE)
    assert views.request(db, first.request_id).idle_attempts == 1


def test_a_database_that_is_away_makes_nobody_a_suspect(db: Database) -> None:
    """Again and again: sent back by others or not, heard of or not."""
    store.insert_job(db, small_plan(4, (0,)))
    for _ in range(6):
        known = claim_some(db, 2, worker="w")
        assert len(known) == 2 and claim_some(db, 1, worker="w"), "its answer was lost"
        first = f"UPDATE requests SET leased_until = '2020-01-01' WHERE id = {known[0].request_id}"
        run(db, first)
        assert store.release_expired(db) == 1
        store.excuse(db, "w", pairs(known))
        assert rows(db, "SELECT DISTINCT state, idle_attempts FROM requests") == [("queued", 0)]


def test_an_attempt_is_excused_also_when_another_holds_the_request(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    held = claim_some(db)
    for _ in range(9):
        crash(db)
        by_other = claim_some(db)
        assert by_other, "no poison: every attempt but this one was excused"
        store.excuse(db, "not seen again", pairs(held))
        held = by_other
    for _ in range(2):  # those whose worker never comes back count
        crash(db)
        assert claim_some(db)
    crash(db)
    assert claim_some(db) == []
    assert views.request(db, held[0].request_id).error_code == "poison"


def test_excuses_end_with_a_token(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    first = claim_some(db)
    crash(db)
    (second,) = claim_some(db)
    store.excuse(db, "not seen again", pairs(first))
    assert rows(db, "SELECT idle_attempts, excused FROM requests") == [(2, 1)]
    flush(db, [write(second, 0, (1,), "a")], lease_seconds=60)
    store.excuse(db, "not seen again", pairs(first))
    assert rows(db, "SELECT idle_attempts, excused FROM requests") == [(0, 0)]


def test_a_waiting_suspect_counts_in_max_parallel(db: Database) -> None:
    store.insert_job(db, small_plan(4, (0,), limits="max_parallel: 2"))
    claim_some(db, 1)
    crash(db)
    assert len(claim_some(db, 9, alone=False)) == 2
    assert claim_some(db) == []


# Workers


def worker(db: Database, name: str) -> None:
    store.register_worker(db, WorkerInfo(name, "host", 1, "tiny", "cpu", 4))


def test_workers_not_seen_are_forgotten_with_what_they_held(db: Database) -> None:
    store.insert_job(db, small_plan(4, (0,)))
    for name in ("gone", "here"):
        worker(db, name)
        claim_some(db, 2, worker=name)
    assert store.forget_workers(db) == []
    run(db, "UPDATE workers SET seen_at = '2020-01-01 00:00:00' WHERE id = 'gone'")
    assert store.forget_workers(db) == ["gone"]
    assert store.forget_workers(db) == []
    assert [w.id for w in views.workers(db)] == ["here"]
    assert rows(db, "SELECT DISTINCT worker_id FROM requests WHERE state = 'running'") == [
        ("here",)
    ]
    store.see_worker(db, "gone")
    assert {w.id for w in views.live_workers(db)} == {"gone", "here"}


def test_what_a_worker_reports_is_shown(db: Database) -> None:
    worker(db, "w")
    (fresh,) = views.workers(db)
    assert (fresh.slots_used, fresh.tokens_per_second, fresh.memory_bytes) == (None, None, None)
    store.see_worker(db, "w", slots_used=3, tokens_per_second=81.5, memory_bytes=2**33)
    (seen,) = views.workers(db)
    assert (seen.slots_used, seen.tokens_per_second, seen.memory_bytes) == (3, 81.5, 2**33)
    assert seen.slots == 4
    store.see_worker(db, "w", slots=2)
    (halved,) = views.workers(db)
    assert halved.slots == 2
