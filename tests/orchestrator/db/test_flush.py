"""The fence: what a flush writes, what it refuses, what it recognises as written already."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.db import replay, store, views
from orchestrator.db.database import Database
from orchestrator.db.store import ChoiceEnd, ChunkWrite, Claimed, RequestWrite, UsageWrite, flush
from orchestrator.errors import WorkerError
from tests.orchestrator.db.builders import claim_some, everything, rows, small_plan, tokens, write


@pytest.fixture
def claimed(db: Database) -> Claimed:
    store.insert_job(db, small_plan(1, (0,), n=2))
    (only,) = claim_some(db)
    return only


def test_tokens_and_text_come_back_as_written(db: Database, claimed: Claimed) -> None:
    logprobs = [{"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": []}]
    chunk = ChunkWrite(0, 0, tokens(2**31 - 1), "é\u2028'\\", logprobs)
    first = RequestWrite(claimed.request_id, claimed.epoch, claimed.attempt, chunks=(chunk,))
    assert flush(db, [first], lease_seconds=60) == store.Flushed(frozenset(), frozenset())
    flush(db, [write(claimed, 1, (7, 0), " next")], lease_seconds=60)
    assert rows(db, "SELECT token_start, n_tokens, text FROM chunks ORDER BY token_start") == [
        (0, 1, "é\u2028'\\"),
        (1, 2, " next"),
    ]
    blob = rows(db, "SELECT token_ids FROM chunks WHERE token_start = 1")[0][0]
    assert bytes(blob) == b"\x07\0\0\0\0\0\0\0"
    assert views.chunks_after(db, claimed.request_id)[0].logprobs == logprobs
    store.release(db, [(claimed.request_id, claimed.epoch)])
    (again,) = claim_some(db)
    assert again.choices[0].token_ids.tolist() == [2**31 - 1, 7, 0]
    assert again.choices[0].token_ids.dtype == np.int32
    assert again.choices[1].token_ids.shape == (0,)
    assert again.created == claimed.created


def test_calls_and_warnings_come_back_as_written_once(db: Database, claimed: Claimed) -> None:
    calls = [{"index": 0, "name": "f", "arguments": ""}, {"index": 0, "arguments": '{"é": "'}]
    more = [{"index": 0, "arguments": '\\""}'}]
    both = (
        ChunkWrite(0, 0, tokens(5, 6), "text", calls=calls),
        ChunkWrite(1, 0, tokens(7), "only text"),
    )
    first = RequestWrite(
        claimed.request_id,
        claimed.epoch,
        claimed.attempt,
        chunks=both,
        warnings=("one", "zwei \u2028"),
        system_fingerprint="fp",
    )
    flush(db, [first], lease_seconds=60)
    again = write(claimed, 2, (8,), "")
    last = replace(again, chunks=(ChunkWrite(0, 2, tokens(), "", calls=more),))
    for _ in range(2):  # the answer to the COMMIT was lost: both come again
        flush(db, [first], lease_seconds=60)
        flush(db, [last], lease_seconds=60)
    found = views.chunks_after(db, claimed.request_id)
    assert [(c.choice, c.text, c.calls) for c in found] == [
        (0, "text", calls),
        (1, "only text", None),
        (0, "", more),
    ]
    end = write(claimed, outcome="failed", error=("a", "b"))  # says nothing of warnings
    flush(db, [end], lease_seconds=60)
    (result,) = views.results(db, claimed.job_id)
    assert result.warnings == ("one", "zwei \u2028")
    assert replay.envelope(db, claimed.request_id).warnings == result.warnings
    assert rows(db, "SELECT count(*) FROM chunks WHERE calls IS NULL") == [(1,)]


def test_the_tokens_of_any_byte_order_are_stored_little_endian(
    db: Database, claimed: Claimed
) -> None:
    big = np.array([1, 2, 3, 4], dtype=">i4")[::2]
    chunk = ChunkWrite(0, 0, big, "x")  # type: ignore[arg-type]
    part = RequestWrite(claimed.request_id, claimed.epoch, claimed.attempt, chunks=(chunk,))
    flush(db, [part], lease_seconds=60)
    assert bytes(rows(db, "SELECT token_ids FROM chunks")[0][0]) == b"\x01\0\0\0\x03\0\0\0"


def test_a_lost_claim_writes_nothing(db: Database, claimed: Claimed) -> None:
    flush(db, [write(claimed, 0, (1, 2), "ab")], lease_seconds=60)
    store.release_worker(db, "w")
    (second,) = claim_some(db, worker="other")
    assert second.epoch == claimed.epoch + 1
    before = everything(db)
    late = [
        write(claimed, 2, (3,), "c", usage=UsageWrite(1, 0, 1, 0)),
    ]
    assert flush(db, late, lease_seconds=60).lost == {claimed.request_id}
    over = [write(claimed, 2, (3,), "c", end="stop", whole="abc", outcome="succeeded")]
    assert flush(db, over, lease_seconds=60).lost == {claimed.request_id}
    failed = [write(claimed, outcome="failed", error=("x", "y"))]
    assert flush(db, failed, lease_seconds=60).lost == {claimed.request_id}
    assert everything(db) == before
    assert not flush(db, [write(second, 2, (3,), "c")], lease_seconds=60).lost


def test_a_claim_that_is_under_way_is_waited_for(db: Database, claimed: Claimed) -> None:
    """Between looking at the fence and writing, nobody else may pass it."""
    before = everything(db)["chunks"]
    with ThreadPoolExecutor(1) as pool:
        with db.write() as tx:
            tx.exec_driver_sql("UPDATE requests SET epoch = epoch + 1")
            late = pool.submit(flush, db, [write(claimed, 0, (1,), "a")], lease_seconds=60)
            time.sleep(0.2)  # long enough for a flush that does not wait to be seen
        assert late.result().lost == {claimed.request_id}
    assert everything(db)["chunks"] == before


def test_a_released_request_takes_no_more_writes(db: Database, claimed: Claimed) -> None:
    store.release(db, [(claimed.request_id, claimed.epoch)])
    before = everything(db)
    for part in (write(claimed, 0, (1,), "a"), write(claimed), write(claimed, outcome="succeeded")):
        assert flush(db, [part], lease_seconds=60).lost == {claimed.request_id}
    assert everything(db) == before


def test_a_lost_request_takes_no_neighbour_with_it(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,)))
    first, second = claim_some(db)
    store.release(db, [(first.request_id, first.epoch)])
    both = [write(first, 0, (1,), "a"), write(second, 0, (2,), "b")]
    assert flush(db, both, lease_seconds=60).lost == {first.request_id}
    assert rows(db, "SELECT request_id, text FROM chunks") == [(second.request_id, "b")]


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_gap_or_an_overlap_is_refused(db: Database, claimed: Claimed, start: int) -> None:
    flush(db, [write(claimed, 0, (1, 2), "ab")], lease_seconds=60)
    before = everything(db)
    assert flush(db, [write(claimed, start, (9, 9, 9), "x")], lease_seconds=60).lost
    assert everything(db) == before


def test_of_one_request_all_or_nothing_is_written(db: Database, claimed: Claimed) -> None:
    good, gap = ChunkWrite(0, 0, tokens(1), "a"), ChunkWrite(1, 5, tokens(1), "a")
    part = RequestWrite(claimed.request_id, claimed.epoch, claimed.attempt, chunks=(good, gap))
    assert flush(db, [part], lease_seconds=60).lost
    assert rows(db, "SELECT * FROM chunks") == []


def test_several_chunks_of_one_choice_in_one_flush(db: Database, claimed: Claimed) -> None:
    chunks = (ChunkWrite(1, 0, tokens(1, 2), "ab"), ChunkWrite(1, 2, tokens(3), "c"))
    part = RequestWrite(claimed.request_id, claimed.epoch, claimed.attempt, chunks=chunks)
    assert not flush(db, [part], lease_seconds=60).lost
    assert rows(db, "SELECT n_tokens FROM choices ORDER BY choice") == [(0,), (3,)]


def test_an_unknown_choice_is_refused(db: Database, claimed: Claimed) -> None:
    assert flush(db, [write(claimed, 0, (1,), "a", choice=2)], lease_seconds=60).lost
    assert flush(db, [write(claimed, choice=2, end="stop")], lease_seconds=60).lost


def test_the_same_flush_again_changes_nothing(db: Database, claimed: Claimed) -> None:
    """The answer to COMMIT was lost: the recorder flushes the same writes once more."""
    usage = UsageWrite(5, 1, 2, 0)
    story = [
        [write(claimed, 0, (1, 2), "a", usage=usage)],
        [write(claimed, 2, (3,), "b", choice=0), write_other(claimed)],
        [write(claimed, 3, (), "held back", end="stop", whole="abheld back")],
        [write(claimed, 1, (), "", choice=1, end="length", whole="x", outcome="succeeded")],
    ]
    for writes in story:
        for part in writes:
            assert not flush(db, [part], lease_seconds=60).lost
            once = everything(db)
            assert flush(db, [part], lease_seconds=60) == store.Flushed(frozenset(), frozenset())
            assert everything(db) == once
    assert views.request(db, claimed.request_id).state == "succeeded"
    assert rows(db, "SELECT token_start, n_tokens, text FROM chunks WHERE choice = 0") == [
        (0, 2, "a"),
        (2, 1, "b"),
        (3, 0, "held back"),
    ]


def write_other(claimed: Claimed) -> RequestWrite:
    return write(claimed, 0, (9,), "x", choice=1)


def test_the_same_place_with_other_tokens_is_lost(db: Database, claimed: Claimed) -> None:
    flush(db, [write(claimed, 0, (1, 2), "ab")], lease_seconds=60)
    assert flush(db, [write(claimed, 0, (1, 3), "ab")], lease_seconds=60).lost


def test_a_repeat_goes_on_where_the_first_ended(db: Database, claimed: Claimed) -> None:
    flush(db, [write(claimed, 0, (1, 2), "ab")], lease_seconds=60)
    chunks = (ChunkWrite(0, 0, tokens(1, 2), "ab"), ChunkWrite(0, 2, tokens(3), "c"))
    part = RequestWrite(claimed.request_id, claimed.epoch, claimed.attempt, chunks=chunks)
    assert not flush(db, [part], lease_seconds=60).lost
    assert rows(db, "SELECT n_tokens FROM choices WHERE choice = 0") == [(3,)]


def test_an_ended_choice_takes_no_more_tokens(db: Database, claimed: Claimed) -> None:
    flush(db, [write(claimed, 0, (1,), "a", end="stop", whole="a")], lease_seconds=60)
    before = everything(db)
    assert flush(db, [write(claimed, 1, (2,), "b")], lease_seconds=60).lost
    assert flush(db, [write(claimed, end="length", whole="b")], lease_seconds=60).lost
    assert everything(db) == before


def test_an_outcome_ends_the_request(db: Database, claimed: Claimed) -> None:
    error = ("prompt_too_long", "the prompt has 9 tokens, the model takes 8\0")
    flush(db, [write(claimed, outcome="failed", error=error)], lease_seconds=60)
    found = views.request(db, claimed.request_id)
    assert (found.state, found.error_code) == ("failed", "prompt_too_long")
    assert found.finished_at is not None
    assert rows(db, "SELECT leased_until, system_fingerprint FROM requests") == [(None, "fp_test")]


def test_usage_is_kept_per_attempt(db: Database, claimed: Claimed) -> None:
    for usage in (UsageWrite(5, 0, 1, 0), UsageWrite(5, 0, 4, 0)):
        flush(db, [write(claimed, usage=usage)], lease_seconds=60)
    store.release_worker(db, "w")
    (second,) = claim_some(db, worker="other")
    flush(db, [write(second, usage=UsageWrite(5, 0, 3, 4))], lease_seconds=60)
    assert rows(db, "SELECT * FROM usage ORDER BY attempt") == [
        (claimed.request_id, 1, 5, 0, 4, 0, "w"),
        (claimed.request_id, 2, 5, 0, 3, 4, "other"),
    ]
    status = views.job_status(db, claimed.job_id)
    assert (status.prompt_tokens, status.completion_tokens, status.replayed_tokens) == (5, 7, 4)


def test_a_flush_renews_the_lease(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    (short,) = claim_some(db, lease=-1)
    flush(db, [write(short)], lease_seconds=60)
    assert store.release_expired(db) == 0
    flush(db, [write(short)], lease_seconds=-1)
    assert store.release_expired(db) == 1


def test_a_cancelled_job_keeps_the_last_text(db: Database, claimed: Claimed) -> None:
    store.cancel_job(db, claimed.job_id)
    assert views.job_status(db, claimed.job_id).state == "running"
    flushed = flush(db, [write(claimed, 0, (1,), "a")], lease_seconds=60)
    assert flushed == store.Flushed(frozenset(), frozenset({claimed.request_id}))
    assert views.job_status(db, claimed.job_id).state == "cancelled"
    assert rows(db, "SELECT text FROM request_text WHERE choice = 0") == [("a",)]
    assert flush(db, [write(claimed, 1, (2,), "b")], lease_seconds=60).lost


def test_a_finished_request_of_a_cancelled_job_has_succeeded(
    db: Database, claimed: Claimed
) -> None:
    store.cancel_job(db, claimed.job_id)
    done = write(claimed, 0, (1,), "a", end="stop", whole="a", outcome="succeeded")
    assert not flush(db, [done], lease_seconds=60).cancelled
    assert views.request(db, claimed.request_id).state == "succeeded"


def test_a_paused_job_gives_its_requests_back(db: Database, claimed: Claimed) -> None:
    store.pause_job(db, claimed.job_id)
    flushed = flush(db, [write(claimed, 0, (1,), "a")], lease_seconds=60)
    assert flushed.cancelled == {claimed.request_id}
    assert claim_some(db) == []
    store.resume_job(db, claimed.job_id)
    (again,) = claim_some(db)
    assert again.choices[0].token_ids.tolist() == [1]


def test_text_with_a_zero_character(db: Database, claimed: Claimed) -> None:
    """PostgreSQL cannot hold U+0000: the flush must not fail for it, nor its neighbours."""
    end = ChoiceEnd(0, "stop", "a\0b")
    chunk = ChunkWrite(0, 0, tokens(1), "a\0b")
    part = RequestWrite(
        claimed.request_id, claimed.epoch, claimed.attempt, chunks=(chunk,), ends=(end,)
    )
    assert not flush(db, [part], lease_seconds=60).lost
    shown = "a\0b" if db.dialect == "sqlite" else "a\N{REPLACEMENT CHARACTER}b"
    assert views.chunks_after(db, claimed.request_id)[0].text == shown


def test_a_full_database_is_one_clear_error(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'full.db'}") as db:
        store.insert_job(db, small_plan(1, (0,)))
        (claimed,) = claim_some(db)
        before = everything(db)
        with db.read() as connection:  # the pool hands out this same connection again
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(WorkerError, match=r"full\.db: the disk is full") as caught:
            flush(db, [write(claimed, 0, (1,), "x" * 100_000)], lease_seconds=60)
        assert caught.value.code == "database"
        assert everything(db) == before
        with db.read() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 100000")
        assert not flush(db, [write(claimed, 0, (1,), "x" * 100_000)], lease_seconds=60).lost
