"""Following a request and a job while somebody else writes them."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator import follow
from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.db.replay import envelope
from orchestrator.db.store import ChunkWrite, Claimed
from orchestrator.db.views import JobStatus
from orchestrator.errors import NotFound, WorkerError
from orchestrator.follow import follow_job, request_chunks, request_text
from orchestrator.spec.chunks import fold
from tests.orchestrator.db.builders import claim_some, small_plan, tokens, write


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)


def flush(db: Database, *writes: store.RequestWrite) -> None:
    store.flush(db, writes, lease_seconds=60)


def two_choices(db: Database) -> Claimed:
    store.insert_job(db, small_plan(1, (0,), n=2))
    (claimed,) = claim_some(db)
    return claimed


def meanwhile(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_text_comes_as_it_is_persisted_choice_after_choice(sqlite_db: Database) -> None:
    claimed = two_choices(sqlite_db)
    pieces = request_text(sqlite_db, claimed.request_id, 2)
    flush(sqlite_db, write(claimed, 0, (1,), "zero", choice=0))
    assert next(pieces) == "--- choice 0\n"
    assert next(pieces) == "zero"
    flush(sqlite_db, write(claimed, 0, (2,), "one", choice=1, end="stop", whole="one"))
    flush(sqlite_db, write(claimed, 1, (3,), "!", choice=0, end="stop", whole="zero!"))
    flush(sqlite_db, write(claimed, outcome="succeeded"))
    assert "".join(pieces) == "!\n--- choice 1\none\n"


def test_text_of_a_failed_request_ends_where_it_ended(sqlite_db: Database) -> None:
    claimed = two_choices(sqlite_db)
    flush(sqlite_db, write(claimed, 0, (1,), "half", choice=1))
    flush(sqlite_db, write(claimed, outcome="failed", error=("poison", "no")))
    text = "".join(request_text(sqlite_db, claimed.request_id, 2))
    assert text == "--- choice 0\n\n--- choice 1\nhalf\n"


def test_calls_are_lines_after_the_text_and_one_that_was_cut_off_stays_open(
    sqlite_db: Database,
) -> None:
    claimed = two_choices(sqlite_db)
    pieces = request_text(sqlite_db, claimed.request_id, 2)

    def said(start: int, choice: int, text: str, *calls: dict[str, object]) -> None:
        chunk = ChunkWrite(choice, start, tokens(start), text, None, calls)
        flush(sqlite_db, replace(write(claimed), chunks=(chunk,)))

    said(0, 0, "Well.", {"index": 0, "name": "f", "arguments": ""})
    assert [next(pieces), next(pieces)] == ["--- choice 0\n", "Well.\nf("]
    said(
        1, 0, "", {"index": 0, "arguments": '{"a": 1}'}, {"index": 1, "name": "g", "arguments": ""}
    )
    assert next(pieces) == '{"a": 1})\ng('
    said(2, 0, "", {"index": 1, "arguments": "{}"})
    said(0, 1, "", {"index": 0, "name": "h", "arguments": ""}, {"index": 0, "arguments": '{"b'})
    flush(sqlite_db, write(claimed, choice=0, end="tool_calls"))
    flush(sqlite_db, write(claimed, choice=1, end="length"))
    flush(sqlite_db, write(claimed, outcome="succeeded"))
    assert "".join(pieces) == '{})\n--- choice 1\nh({"b\n'


def test_chunks_written_one_by_one_arrive_once_and_fold_to_the_whole(sqlite_db: Database) -> None:
    claimed = two_choices(sqlite_db)

    def work() -> None:
        for start in range(20):
            flush(sqlite_db, write(claimed, start, (start,), f"{start} ", choice=1))
            flush(sqlite_db, write(claimed, start, (start,), f"<{start}>", choice=0))
        texts = ["".join(f"<{i}>" for i in range(20)), "".join(f"{i} " for i in range(20))]
        for choice, whole in enumerate(texts):
            flush(sqlite_db, write(claimed, choice=choice, end="length", whole=whole))
        flush(sqlite_db, write(claimed, outcome="succeeded"))

    writer = meanwhile(work)
    chunks = list(request_chunks(sqlite_db, claimed.request_id))
    writer.join()
    folded = fold(chunks)
    assert [c["message"]["content"] for c in folded["choices"]] == [
        "".join(f"<{i}>" for i in range(20)),
        "".join(f"{i} " for i in range(20)),
    ]
    assert {c["system_fingerprint"] for c in chunks} == {"fp_test"}
    assert all(c["finish_reason"] == "length" for c in folded["choices"])
    indices = [c["choices"][0]["index"] for c in chunks]
    assert indices.index(0) < indices.index(1)


def test_a_job_is_followed_to_its_end_or_pause_and_the_check_may_stop_it(
    sqlite_db: Database,
) -> None:
    job_id = store.insert_job(sqlite_db, small_plan(1, (0,)))
    seen: list[JobStatus] = []

    def broken() -> None:
        raise WorkerError("worker", "gone")

    with pytest.raises(WorkerError, match="gone"):
        follow_job(sqlite_db, job_id, seen.append, broken)
    assert [status.state for status in seen] == ["queued"]

    def work() -> None:
        (claimed,) = claim_some(sqlite_db)
        end = write(claimed, 0, (1,), "a", end="stop", whole="a", outcome="succeeded")
        flush(sqlite_db, end)

    writer = meanwhile(work)
    assert follow_job(sqlite_db, job_id, seen.append, lambda: None).state == "succeeded"
    writer.join()

    other = store.insert_job(sqlite_db, small_plan(1, (0,)))
    store.pause_job(sqlite_db, other)
    assert follow_job(sqlite_db, other, seen.append, lambda: None).state == "paused"


def test_an_unknown_request_is_not_found(sqlite_db: Database) -> None:
    with pytest.raises(NotFound, match="request '5'"):
        envelope(sqlite_db, 5)
