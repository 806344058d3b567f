"""Events to rows on both databases: what a flush writes, what it gives up, what it survives."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event

from orchestrator.db import database, replay, store, views
from orchestrator.db.database import Database
from orchestrator.db.store import Claimed
from orchestrator.errors import RequestError, WorkerError
from tests.orchestrator.db.builders import claim_some, everything, rows, small_plan
from workers import recorder as module
from workers.engine.engine import Failed, Finished, Started, Tokens
from workers.recorder import Recorder
from workers.words.text import CallDelta

CHUNKS = (
    "SELECT choice, token_start, n_tokens, text FROM chunks ORDER BY request_id, choice, "
    "token_start"
)
USAGE = (
    "SELECT attempt, prompt_tokens, cached_tokens, completion_tokens, replayed_tokens FROM usage "
    "ORDER BY request_id, attempt"
)
REQUESTS = "SELECT state, idle_attempts, error_code, error_message FROM requests ORDER BY id"


def recorder(
    db: Database, claims: list[Claimed], *, lease: float = 60, flush: float = 0.25
) -> Recorder:
    """A recorder that has begun these claims."""
    made = Recorder(
        db, model="tiny", fingerprint="fp_test", lease_seconds=lease, flush_seconds=flush
    )
    for claimed in claims:
        made.begin(claimed)
    return made


def said(
    claimed: Claimed, start: int, *ids: int, text: str = "", choice: int = 0, logprobs: Any = ()
) -> Tokens:
    return Tokens(claimed.request_id, choice, start, ids, text, tuple(logprobs))


def started(claimed: Claimed, prompt: int = 9) -> Started:
    replayed = sum(len(choice.token_ids) for choice in claimed.choices)
    return Started(claimed.request_id, prompt, replayed)


def called(claimed: Claimed, start: int, *deltas: CallDelta, choice: int = 0) -> Tokens:
    """One token, and the parts of calls that it told."""
    return Tokens(claimed.request_id, choice, start, (9,), "", (), deltas)


def ended(claimed: Claimed, text: str, choice: int = 0, reason: str = "stop") -> Finished:
    return Finished(claimed.request_id, choice, reason, text)


@pytest.fixture
def claimed(db: Database) -> Claimed:
    """One request with two choices."""
    store.insert_job(db, small_plan(1, (0,), n=2))
    (only,) = claim_some(db)
    return only


def test_a_suspects_first_token_is_due_at_once(claimed: Claimed, db: Database) -> None:
    """Others wait until it is stored."""
    for idle, due in ((1, False), (2, True)):
        mine = recorder(db, [replace(claimed, idle_attempts=idle)], flush=60)
        mine.flush()
        mine.record([started(claimed)])
        assert not mine.due
        mine.record([said(claimed, 0, 5, text="a")])
        assert mine.due is due
    mine.flush()
    mine.record([said(claimed, 1, 6, text="b")])
    assert not mine.due


# --- what a flush writes --------------------------------------------------------------------------


def test_what_was_emitted_between_two_flushes_is_one_chunk_a_choice(
    db: Database, claimed: Claimed
) -> None:
    mine = recorder(db, [claimed])
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    mine.record([started(claimed), said(claimed, 0, 5, text="a", logprobs=[entry])])
    mine.record([said(claimed, 0, 8, text="x", choice=1), said(claimed, 1, 6, text="b")])
    mine.record([said(claimed, 2, 7, logprobs=[entry | {"logprob": -1.5}])])
    assert rows(db, CHUNKS) == []
    assert mine.flush() == frozenset()
    assert rows(db, CHUNKS) == [(0, 0, 3, "ab"), (1, 0, 1, "x")]
    assert mine.flush() == frozenset()
    mine.record([said(claimed, 3, 9, text="c")])
    assert mine.flush() == frozenset()
    assert rows(db, CHUNKS) == [(0, 0, 3, "ab"), (0, 3, 1, "c"), (1, 0, 1, "x")]
    stored = views.chunks_after(db, claimed.request_id)
    assert stored[0].logprobs == [entry, entry | {"logprob": -1.5}]
    assert stored[1].logprobs is None
    assert rows(db, "SELECT choice, n_tokens, text FROM choices ORDER BY choice") == [
        (0, 4, None),
        (1, 1, None),
    ]
    assert rows(db, "SELECT system_fingerprint FROM requests") == [("fp_test",)]
    store.release_worker(db, "w")
    (again,) = claim_some(db)
    assert [choice.token_ids.tolist() for choice in again.choices] == [[5, 6, 7, 9], [8]]


def test_fragments_of_a_call_are_one_in_each_flush(db: Database, claimed: Claimed) -> None:
    mine = recorder(db, [claimed])
    first = [CallDelta(0, "f"), CallDelta(0, arguments="{"), CallDelta(0, arguments='"a"')]
    mine.record([started(claimed), said(claimed, 0, 5, text="x"), called(claimed, 1, *first)])
    mine.record([called(claimed, 0, CallDelta(0, "one"), choice=1)])
    mine.flush()
    mine.record([called(claimed, 2, CallDelta(0, arguments=": 1"))])
    mine.record([called(claimed, 3, CallDelta(0, arguments="}"), CallDelta(1, "g"))])
    mine.record([called(claimed, 4), called(claimed, 5, CallDelta(1, arguments="{}"))])
    mine.flush()
    mine.record([called(claimed, 6)])
    mine.flush()
    stored = views.chunks_after(db, claimed.request_id)
    assert [(c.choice, c.token_start, c.text, c.calls) for c in stored] == [
        (
            *(0, 0, "x"),
            [{"index": 0, "name": "f", "arguments": ""}, {"index": 0, "arguments": '{"a"'}],
        ),
        (1, 0, "", [{"index": 0, "name": "one", "arguments": ""}]),
        (
            *(0, 2, ""),
            [
                {"index": 0, "arguments": ": 1}"},
                {"index": 1, "name": "g", "arguments": ""},
                {"index": 1, "arguments": "{}"},
            ],
        ),
        (0, 6, "", None),
    ]


def test_what_is_not_kept_to_is_written_with_the_first_flush(
    db: Database, claimed: Claimed
) -> None:
    mine = recorder(db, [claimed])
    mine.record([replace(started(claimed), warnings=("a", "b"))])
    mine.flush()
    mine.record([said(claimed, 0, 5, text="x")])
    mine.flush()
    assert replay.envelope(db, claimed.request_id).warnings == ("a", "b")


def test_text_released_at_the_end_is_a_chunk_without_tokens(db: Database, claimed: Claimed) -> None:
    mine = recorder(db, [claimed])
    mine.record([started(claimed), said(claimed, 0, 5, 6)])
    mine.flush()
    tail = [{"token": "\ufffd", "logprob": -2.0, "bytes": [240], "top_logprobs": []}]
    mine.record([said(claimed, 2, text="\ufffd", logprobs=tail), ended(claimed, "\ufffd")])
    mine.flush()
    assert rows(db, CHUNKS) == [(0, 0, 2, ""), (0, 2, 0, "\ufffd")]
    assert views.chunks_after(db, claimed.request_id)[1].logprobs == tail
    assert rows(db, "SELECT n_tokens, finish_reason, text FROM choices WHERE choice = 0") == [
        (2, "stop", "\ufffd")
    ]


def test_a_request_has_succeeded_when_its_last_choice_has_ended(
    db: Database, claimed: Claimed
) -> None:
    mine = recorder(db, [claimed])
    mine.record([started(claimed), said(claimed, 0, 5, text="a", choice=1)])
    mine.record([ended(claimed, "a", choice=1, reason="length")])
    mine.flush()
    assert rows(db, REQUESTS) == [("running", 0, None, None)]
    assert mine.open == [claimed] and mine.finished_jobs == set()
    mine.record([said(claimed, 0, 6, text="b"), ended(claimed, "b")])
    assert mine.flush() == frozenset()
    assert rows(db, REQUESTS) == [("succeeded", 0, None, None)]
    assert rows(db, "SELECT finish_reason, text FROM choices ORDER BY choice") == [
        ("stop", "b"),
        ("length", "a"),
    ]
    assert mine.open == [] and mine.finished_jobs == {claimed.job_id}
    held = "SELECT leased_until, finished_at IS NOT NULL FROM requests"
    assert [(lease, bool(over)) for lease, over in rows(db, held)] == [(None, True)]


def test_a_request_that_is_over_when_its_job_is_paused_has_succeeded(
    db: Database, claimed: Claimed
) -> None:
    mine = recorder(db, [claimed])
    mine.record([started(claimed), said(claimed, 0, 5, text="a"), ended(claimed, "a")])
    mine.record([ended(claimed, "", choice=1)])
    store.pause_job(db, claimed.job_id)
    assert mine.flush() == frozenset()
    assert rows(db, REQUESTS) == [("succeeded", 0, None, None)]


def test_a_choice_that_had_ended_before_is_not_waited_for(db: Database, claimed: Claimed) -> None:
    first = recorder(db, [claimed])
    first.record([started(claimed), ended(claimed, "", choice=1)])
    first.release()
    (again,) = claim_some(db)
    second = recorder(db, [again])
    second.record([started(again), said(again, 0, 5, text="a"), ended(again, "a")])
    second.flush()
    assert rows(db, REQUESTS) == [("succeeded", 0, None, None)]


def test_usage_counts_each_attempt_by_itself(db: Database, claimed: Claimed) -> None:
    first = recorder(db, [claimed])
    first.flush()
    assert rows(db, USAGE) == [(1, 0, 0, 0, 0)]
    first.record([started(claimed), said(claimed, 0, 5, 6, text="ab")])
    first.flush()
    first.record([said(claimed, 0, 7, text="x", choice=1)])
    first.release()
    (again,) = claim_some(db)
    second = recorder(db, [again])
    second.record([started(again), said(again, 2, 8, text="c"), ended(again, "abc")])
    second.record([said(again, 1, text="!", choice=1), ended(again, "x!", choice=1)])
    second.flush()
    assert rows(db, USAGE) == [(1, 9, 0, 3, 0), (2, 9, 0, 1, 3)]
    status = views.job_status(db, claimed.job_id)
    assert (status.completion_tokens, status.replayed_tokens) == (4, 3)
    counted = rows(db, "SELECT sum(n_tokens) FROM choices")[0][0]
    assert counted == status.completion_tokens


def test_a_failure_keeps_the_tokens_before_it(db: Database, claimed: Claimed) -> None:
    mine = recorder(db, [claimed])
    error = RequestError("nan_logits", "The model computed NaN.")
    mine.record([started(claimed), said(claimed, 0, 5, text="a")])
    mine.record([Failed(claimed.request_id, error)])
    assert mine.flush() == frozenset()
    assert rows(db, REQUESTS) == [("failed", 0, "nan_logits", "The model computed NaN.")]
    assert rows(db, CHUNKS) == [(0, 0, 1, "a")]
    assert mine.open == [] and mine.finished_jobs == {claimed.job_id}


def test_what_cannot_be_admitted_fails_alone(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,)))
    bad, good = claim_some(db)
    mine = recorder(db, [bad, good])
    mine.fail(bad.request_id, RequestError("template_error", "why"))
    mine.record([started(good), said(good, 0, 5, text="a")])
    mine.flush()
    assert [row[0] for row in rows(db, REQUESTS)] == ["failed", "running"]
    assert mine.open == [good]


def test_any_text_can_be_the_reason(db: Database, claimed: Claimed) -> None:
    mine = recorder(db, [claimed])
    mine.fail(claimed.request_id, RequestError("template_error", "é\0\U0001f642" + "x" * 100_000))
    mine.flush()
    assert len(rows(db, REQUESTS)[0][3]) == 100_003


def test_events_of_a_request_that_is_not_open_are_nothing(db: Database, claimed: Claimed) -> None:
    mine = recorder(db, [])
    mine.record([started(claimed), said(claimed, 0, 5, text="a"), ended(claimed, "a")])
    before = everything(db)
    assert mine.flush() == frozenset()
    assert everything(db) == before


def test_due_after_the_interval_and_not_before(
    sqlite_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(lambda naps: None)
    monkeypatch.setattr(module, "time", clock)
    mine = Recorder(sqlite_db, model="tiny", fingerprint="fp", lease_seconds=60, flush_seconds=0.25)
    clock.sleep(0.24)
    assert not mine.due
    clock.sleep(0.01)
    assert mine.due
    mine.flush()
    assert not mine.due


# --- what comes back ------------------------------------------------------------------------------


def test_a_lost_lease_writes_nothing_and_comes_back_by_its_id(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,)))
    lost, kept = claim_some(db, lease=-1)
    mine = recorder(db, [lost, kept])
    store.release_expired(db)
    (other,) = claim_some(db, 1, worker="other")
    assert (other.request_id, other.epoch) == (lost.request_id, lost.epoch + 1)
    before = everything(db)
    mine.record([started(lost), said(lost, 0, 5, text="a"), ended(lost, "a")])
    mine.fail(kept.request_id, RequestError("x", "it is queued again, so this is lost as well"))
    assert mine.flush() == {lost.request_id, kept.request_id}
    assert everything(db) == before
    assert mine.open == [] and mine.finished_jobs == set()
    theirs = recorder(db, [other])
    theirs.record([started(other), said(other, 0, 7, text="b"), ended(other, "b")])
    assert theirs.flush() == frozenset()
    assert rows(db, CHUNKS) == [(0, 0, 1, "b")]


def test_a_lost_request_takes_no_neighbour_with_it(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0,)))
    lost, kept = claim_some(db)
    mine = recorder(db, [lost, kept])
    store.release(db, [(lost.request_id, lost.epoch)])
    mine.record([started(each) for each in (lost, kept)])
    mine.record([said(lost, 0, 5, text="a"), said(kept, 0, 6, text="b")])
    assert mine.flush() == {lost.request_id}
    assert rows(db, CHUNKS) == [(0, 0, 1, "b")]
    assert mine.open == [kept]


@pytest.mark.parametrize(
    ("stop", "state"), [(store.pause_job, "queued"), (store.cancel_job, "cancelled")]
)
def test_a_stopped_jobs_requests_come_back_with_their_tokens_kept(
    db: Database, claimed: Claimed, stop: Callable[[Database, str], None], state: str
) -> None:
    mine = recorder(db, [claimed])
    mine.record([started(claimed), said(claimed, 0, 5, 6, text="ab")])
    stop(db, claimed.job_id)
    assert mine.flush() == {claimed.request_id}
    assert rows(db, REQUESTS) == [(state, 0, None, None)]
    assert rows(db, CHUNKS) == [(0, 0, 2, "ab")]
    assert rows(db, USAGE) == [(1, 9, 0, 2, 0)]
    assert mine.open == [] and mine.finished_jobs == set()
    assert mine.flush() == frozenset()
    if state == "queued":
        store.resume_job(db, claimed.job_id)
        (again,) = claim_some(db)
        assert again.choices[0].token_ids.tolist() == [5, 6]


def test_release_writes_first_and_gives_back_what_is_open(db: Database) -> None:
    store.insert_job(db, small_plan(3, (0,)))
    over, begun, waiting = claim_some(db)
    mine = recorder(db, [over, begun, waiting])
    mine.record([started(over), said(over, 0, 1, text="x"), ended(over, "x")])
    mine.record([started(begun), said(begun, 0, 5, 6, text="ab")])
    mine.release()
    assert mine.open == []
    assert [row[:2] for row in rows(db, REQUESTS)] == [
        ("succeeded", 0),
        ("queued", 0),
        ("queued", 0),
    ]
    again = claim_some(db)
    assert [c.choices[0].token_ids.tolist() for c in again] == [[5, 6], []]


# --- idle attempts --------------------------------------------------------------------------------


def test_waiting_for_a_slot_is_no_idle_attempt(db: Database, claimed: Claimed) -> None:
    claims = [claimed]
    for attempt in range(1, 6):
        assert [c.attempt for c in claims] == [attempt]
        recorder(db, claims, lease=-1).flush()
        assert store.release_expired(db) == 1
        claims = claim_some(db)
    assert [c.attempt for c in claims] == [6]


def test_released_without_a_token_is_no_idle_attempt(db: Database, claimed: Claimed) -> None:
    claims = [claimed]
    for _ in range(5):
        mine = recorder(db, claims)
        mine.record([started(claims[0])])
        mine.flush()
        mine.release()
        claims = claim_some(db)
    assert [(c.attempt, c.idle_attempts) for c in claims] == [(6, 1)]


def die_idle(db: Database, claims: list[Claimed]) -> list[Claimed]:
    """Begin, show life, die without a token; the next claim."""
    mine = recorder(db, claims, lease=-1)
    mine.record([started(claim) for claim in claims])
    mine.flush()
    mine.flush()
    assert store.release_expired(db) == len(claims)
    return claim_some(db)


def test_three_deaths_without_a_token_are_poison(db: Database, claimed: Claimed) -> None:
    claims = [claimed]
    for attempt in range(1, 4):
        assert [(c.attempt, c.idle_attempts) for c in claims] == [(attempt, attempt)]
        claims = die_idle(db, claims)
    assert claims == []
    assert rows(db, REQUESTS)[0][::2] == ("failed", "poison")


def test_a_token_makes_the_count_begin_anew(db: Database, claimed: Claimed) -> None:
    claims = die_idle(db, die_idle(db, [claimed]))
    mine = recorder(db, claims, lease=-1)
    mine.record([started(claims[0]), said(claims[0], 0, 5, text="a")])
    mine.flush()
    mine.flush()  # which brings nothing new, and must not count the token away
    store.release_expired(db)
    claims = claim_some(db)
    for count in range(1, 4):
        assert [c.idle_attempts for c in claims] == [count]
        claims = die_idle(db, claims)
    assert claims == []


# --- a database that is away ----------------------------------------------------------------------


LOCKED = "another process kept it locked"


class Clock(SimpleNamespace):
    """Time that passes only in `sleep`, and what shall happen when it has."""

    def __init__(self, wakes: Callable[[int], None]) -> None:
        super().__init__()
        self.now, self.naps, self._wakes = 1000.0, 0, wakes

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps += 1
        self._wakes(self.naps)


@pytest.fixture
def locked(
    sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Database, sqlite3.Connection]]:
    """A SQLite database that gives up on a lock at once, and a connection that may lock it."""
    file = tmp_path / "locked.db"
    shutil.copy(sqlite_template, file)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    other = sqlite3.connect(file, isolation_level=None)
    with Database.open(f"sqlite:///{file}") as db:
        yield db, other
    other.close()


def begin(db: Database, *, lease: float = 60) -> Recorder:
    """A recorder with two claims, each with an event to be flushed; the second one has ended."""
    store.insert_job(db, small_plan(2, (0,)))
    first, second = claim_some(db)
    mine = recorder(db, [first, second], lease=lease)
    mine.record([started(first), said(first, 0, 5, 6, text="ab")])
    mine.record([started(second), said(second, 0, 7, text="c"), ended(second, "c")])
    return mine


def landed_once(db: Database) -> None:
    assert rows(db, CHUNKS) == [(0, 0, 2, "ab"), (0, 0, 1, "c")]
    assert rows(db, USAGE) == [(1, 9, 0, 2, 0), (1, 9, 0, 1, 0)]
    assert [row[0] for row in rows(db, REQUESTS)] == ["running", "succeeded"]


def test_a_locked_database_is_tried_again(
    locked: tuple[Database, sqlite3.Connection],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    db, other = locked
    mine = begin(db)
    other.execute("BEGIN EXCLUSIVE")
    clock = Clock(lambda naps: other.execute("ROLLBACK") if naps == 3 else None)  # type: ignore
    monkeypatch.setattr(module, "time", clock)
    assert mine.flush() == frozenset()
    assert clock.naps == 3
    (told,) = caplog.messages
    assert told.startswith("flush.retry ") and f"locked.db: {LOCKED}" in told
    landed_once(db)
    mine.record([said(mine.open[0], 2, 8, text="d")])
    assert mine.flush() == frozenset()
    assert rows(db, "SELECT count(*) FROM chunks") == [(3,)]


def test_away_for_longer_than_the_lease_is_the_machines_fault(
    locked: tuple[Database, sqlite3.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    db, other = locked
    mine = begin(db, lease=6)
    before = everything(db)
    other.execute("BEGIN EXCLUSIVE")
    clock = Clock(lambda naps: None)
    monkeypatch.setattr(module, "time", clock)
    with pytest.raises(WorkerError, match=LOCKED) as raised:
        mine.flush()
    assert raised.value.code == "database"
    assert 6 <= clock.now - 1000 < 7
    other.execute("ROLLBACK")
    assert everything(db) == before
    assert len(mine.open) == 2, "what was gathered is still there"
    assert mine.flush() == frozenset()
    landed_once(db)


def test_a_connection_cut_in_the_middle_of_a_flush_is_replaced(
    postgresql_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = postgresql_db
    mine = begin(db)
    cut: list[int] = []

    @event.listens_for(db.engine, "after_cursor_execute")
    def cut_once(connection: Any, cursor: Any, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO chunks") and not cut:
            cut.append(connection.connection.dbapi_connection.info.backend_pid)
            with Database(database._engine(_url(db))) as other:
                rows(other, f"SELECT pg_terminate_backend({cut[0]}, 5000)")

    clock = Clock(lambda naps: None)
    monkeypatch.setattr(module, "time", clock)
    assert mine.flush() == frozenset()
    assert len(cut) == 1 and clock.naps == 1
    landed_once(db)


def test_idle_connections_that_were_cut_are_not_even_noticed(
    postgresql_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = postgresql_db
    mine = begin(db)
    with Database(database._engine(_url(db))) as other:
        rows(
            other,
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
    clock = Clock(lambda naps: None)
    monkeypatch.setattr(module, "time", clock)
    assert mine.flush() == frozenset()
    assert clock.naps == 0
    landed_once(db)


@pytest.mark.parametrize("which", [1, 2])
def test_a_lost_answer_to_commit_is_found_written(
    db: Database, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """It succeeds and the client hears of a failure: of the flush, or of the giving back."""
    mine = begin(db)
    (first, _) = mine.open
    if which == 2:
        store.pause_job(db, first.job_id)
    dialect, commits = db.engine.dialect, [0]
    commit, failure = dialect.do_commit, dialect.loaded_dbapi.OperationalError

    def deaf(connection: Any) -> None:
        commit(connection)
        commits[0] += 1
        if commits[0] == which:
            raise failure("the server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", deaf)
    monkeypatch.setattr(module, "time", Clock(lambda naps: None))
    gone = mine.flush()
    assert commits[0] > which, "it was tried again"
    if which == 1:
        assert gone == frozenset()
        landed_once(db)
        assert mine.open == [first]
    else:  # given back already: not ours any more, and still nothing is lost or doubled
        assert gone == {first.request_id}
        assert rows(db, CHUNKS) == [(0, 0, 2, "ab"), (0, 0, 1, "c")]
        assert [row[0] for row in rows(db, REQUESTS)] == ["queued", "succeeded"]
    assert mine.finished_jobs == {first.job_id}


def _url(db: Database) -> str:
    return db.engine.url.render_as_string(hide_password=False)
