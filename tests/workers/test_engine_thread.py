"""One engine's thread over a runner without a model: errors, suspects, databases that go away."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sqlalchemy import text

from orchestrator import export
from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.errors import WorkerError
from orchestrator.metrics import REGISTRY
from orchestrator.settings import Settings
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.fake_runner import FakeRunner
from workers.engine.prefixes import BLOCK
from workers.engine_thread import EngineThread
from workers.folders.folder import TINY, ModelFolder
from workers.loading.model import LoadedModel
from workers.words.tokenizer import Tokenizer

SETTINGS = Settings(threads=1, flush_seconds=0.01, poll_seconds=0.02, lease_seconds=30)
JOB = """
name: words
model: tiny
dataset: {items: [%s]}
params:
  messages: [{role: user, content: "{{ word }}"}]
  max_tokens: 12
"""
WORDS = ["planet", "garden", "window", "guilty", "silver", "candle", "bridge", "forest"]
Fault = Callable[[Sequence[bytes]], None]


class WatchedRunner(FakeRunner):
    """Calls `fault` before each step with the prompts of its rows, as the text they were."""

    device = "fake"

    def __init__(self, fault: Fault) -> None:
        self._tokenizer = Tokenizer(TINY)
        super().__init__(self._tokenizer.vocab_size, slots=8, max_length=256)
        self.fault = fault

    def decode(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> npt.NDArray[np.float32]:
        batch = len(np.asarray(tokens))
        self.fault([self._text(slot) for slot in range(batch)])
        return super().decode(tokens, lengths)

    def _text(self, slot: int) -> bytes:
        return b"".join(self._tokenizer.token_bytes(int(t)) for t in self.memory[slot] if t >= 0)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return LoadedModel.load(ModelFolder.load(TINY), SETTINGS, slots=1)


def submit(db: Database, words: Sequence[str] = WORDS) -> str:
    items = ", ".join(f"{{word: {word}}}" for word in words)
    return store.insert_job(db, plan(parse_job(JOB % items, file="words.yaml", root=Path())))


@contextmanager
def at_work(
    db: Database,
    model: LoadedModel,
    fault: Fault,
    *,
    settings: Settings = SETTINGS,
    **how: Any,
) -> Iterator[EngineThread]:
    runner: Any = WatchedRunner(fault)
    # An end token of the real model may never be drawn here: every choice runs to its limit.
    wording = replace(model.wording, eos=frozenset())
    model = replace(model, runner=runner, wording=wording)
    thread = EngineThread(settings, db, model, **how)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def wait(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def states(db: Database, job_id: str) -> dict[str, tuple[str, str | None]]:
    return {WORDS[r.item_position]: (r.state, r.error_code) for r in views.requests(db, job_id)}


def texts(db: Database, job_id: str) -> dict[int, str]:
    return {
        result.item_position: result.choices[0].text or "" for result in views.results(db, job_id)
    }


def column(db: Database, job_id: str, name: str) -> list[Any]:
    with db.read() as rows:
        sql = text(f"SELECT {name} FROM requests WHERE job_id = :job ORDER BY id")
        return list(rows.scalars(sql, {"job": job_id}))


def nothing(_rows: Sequence[bytes]) -> None:
    pass


def test_out_of_memory_fails_the_guilty_request_and_no_other(
    db: Database, tiny: LoadedModel
) -> None:
    def memory(rows: Sequence[bytes]) -> None:
        if any(b"guilty" in row for row in rows):
            raise WorkerError("memory", "CUDA out of memory")

    job_id = submit(db)
    with at_work(db, tiny, memory):
        wait(lambda: views.job_status(db, job_id).state == "partial")
    expected = dict.fromkeys(WORDS, ("succeeded", None)) | {"guilty": ("failed", "out_of_memory")}
    assert states(db, job_id) == expected
    assert set(column(db, job_id, "attempt")) == {1}
    with at_work(db, tiny, nothing):
        undisturbed = submit(db)
        wait(lambda: views.job_status(db, undisturbed).state == "succeeded")
    disturbed, golden = texts(db, job_id), texts(db, undisturbed)
    assert len(golden) == len(WORDS)
    innocent = [position for position, word in enumerate(WORDS) if word != "guilty"]
    assert {p: disturbed[p] for p in innocent} == {p: golden[p] for p in innocent}


def test_an_exception_gives_the_guilty_back_with_a_delay_and_another_attempt(
    db: Database, tiny: LoadedModel
) -> None:
    failing = threading.Event()
    failing.set()

    def poison(rows: Sequence[bytes]) -> None:
        if failing.is_set() and any(b"guilty" in row for row in rows):
            raise RuntimeError("a bug, or the driver")

    job_id = submit(db)
    guilty = WORDS.index("guilty")
    with at_work(db, tiny, poison) as thread:
        wait(lambda: column(db, job_id, "failures")[guilty] == 1)
        wait(lambda: views.job_status(db, job_id).succeeded == len(WORDS) - 1)
        assert column(db, job_id, "retry_at")[guilty] is not None
        assert [n for i, n in enumerate(column(db, job_id, "attempt")) if i != guilty] == [1] * 7
        failing.clear()
        wait(lambda: views.job_status(db, job_id).state == "succeeded")
        assert thread.error is None
    assert column(db, job_id, "attempt")[guilty] >= 2


def test_a_suspect_is_alone_until_it_has_stored_a_token(db: Database, tiny: LoadedModel) -> None:
    job_id = submit(db)
    with db.write() as tx:  # as if a worker had died with it before its first token
        tx.execute(text("UPDATE requests SET idle_attempts = 1 WHERE id % 1000000000 = 3"))
    shared: list[int] = []
    alone: list[int] = []

    def note(rows: Sequence[bytes]) -> None:
        if any(b"guilty" in row for row in rows):
            stored = next(r for r in views.requests(db, job_id) if r.item_position == 3).n_tokens
            (shared if len(rows) > 1 else alone).append(stored)

    with at_work(db, tiny, note, settings=replace(SETTINGS, flush_seconds=0.2)):
        wait(lambda: views.job_status(db, job_id).state == "succeeded")
    assert alone and alone[0] == 0
    assert all(tokens > 0 for tokens in shared)


def test_a_suspect_comes_to_its_turn_beside_work_that_never_ends(
    sqlite_db: Database, tiny: LoadedModel
) -> None:
    endless = submit(sqlite_db, [f"word{i}" for i in range(600)])
    job_id = submit(sqlite_db)
    with sqlite_db.write() as tx:
        tx.execute(text(f"UPDATE requests SET idle_attempts = 2 WHERE job_id = '{job_id}'"))

    with at_work(sqlite_db, tiny, lambda rows: time.sleep(0.005)):
        wait(lambda: views.job_status(sqlite_db, job_id).succeeded >= 3)
        assert views.job_status(sqlite_db, endless).queued > 0


def test_a_suspect_comes_to_its_turn_beside_prompts_that_come_in_chunks(
    sqlite_db: Database, tiny: LoadedModel
) -> None:
    endless = submit(sqlite_db, [f"{i:03}" * 50 for i in range(400)])
    job_id = submit(sqlite_db)
    with sqlite_db.write() as tx:
        tx.execute(text(f"UPDATE requests SET idle_attempts = 2 WHERE job_id = '{job_id}'"))
        tx.execute(text(f"UPDATE jobs SET paused_at = created_at WHERE id = '{job_id}'"))
    busy = threading.Event()

    def step(_rows: Sequence[bytes]) -> None:
        time.sleep(0.002)
        busy.set()

    # Of itself it never flushes: the moment at which all that have begun have stored a token is
    # made, or there is none.
    settings = replace(SETTINGS, max_stall_ms=1, flush_seconds=1e6, lease_seconds=1e6)
    with at_work(sqlite_db, tiny, step, settings=settings):
        wait(busy.is_set)
        with sqlite_db.write() as tx:
            tx.execute(text("UPDATE jobs SET paused_at = NULL"))
        wait(lambda: "running" in column(sqlite_db, job_id, "state"), seconds=30)
        assert views.job_status(sqlite_db, endless).queued > 0


@pytest.mark.parametrize("lasting", [True, False])
def test_a_database_that_is_away_is_waited_for_by_a_worker_of_the_fleet(
    sqlite_db: Database,
    tiny: LoadedModel,
    lasting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = submit(sqlite_db)
    away, claim = threading.Event(), store.claim
    away.set()

    def absent(*args: Any, **kwargs: Any) -> list[store.Claimed]:
        if away.is_set():
            raise WorkerError("database", "connection refused")
        return claim(*args, **kwargs)

    monkeypatch.setattr(store, "claim", absent)
    ended = threading.Event()
    with at_work(sqlite_db, tiny, nothing, lasting=lasting, ended=ended.set) as thread:
        if not lasting:
            wait(ended.is_set)
            assert isinstance(thread.error, WorkerError) and thread.error.code == "database"
            return
        time.sleep(0.1)
        away.clear()
        wait(lambda: views.job_status(sqlite_db, job_id).state == "succeeded")
        assert thread.error is None


def test_however_often_the_database_goes_away_nobody_is_poison(
    db: Database, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(db)
    away, flush = threading.Event(), store.flush
    away.set()

    def cut_off(*args: Any, **kwargs: Any) -> store.Flushed:
        if away.is_set():
            raise WorkerError("database", "connection refused")
        return flush(*args, **kwargs)

    monkeypatch.setattr(store, "flush", cut_off)

    def often() -> bool:
        store.release_expired(db)
        return max(column(db, job_id, "attempt")) >= 6 or over()

    def over() -> bool:
        return views.job_status(db, job_id).state in ("succeeded", "partial", "failed")

    settings = replace(SETTINGS, lease_seconds=0.2)
    with at_work(db, tiny, nothing, settings=settings, lasting=True):
        wait(often)
        away.clear()
        wait(over)
    assert {state for state, _ in states(db, job_id).values()} == {"succeeded"}


class SlowTemplate:
    """Renders like another one, but takes its time."""

    def __init__(self, template: Any, seconds: float) -> None:
        self.template, self.seconds = template, seconds

    def render(self, *args: Any, **kwargs: Any) -> str:
        time.sleep(self.seconds)
        return str(self.template.render(*args, **kwargs))


def test_claims_are_kept_while_their_templates_take_longer_than_a_lease(
    db: Database, tiny: LoadedModel
) -> None:
    job_id = submit(db)
    slow: Any = SlowTemplate(tiny.wording.template, 0.4)
    model = replace(tiny, wording=replace(tiny.wording, template=slow))
    settings = replace(SETTINGS, lease_seconds=2.0)
    with at_work(db, model, nothing, settings=settings):
        while views.job_status(db, job_id).state != "succeeded":
            assert store.release_expired(db) == 0, "a lease ran out"
            time.sleep(0.05)
    assert set(column(db, job_id, "attempt")) == {1}


def test_a_machine_on_which_nothing_works_gives_everything_back_and_leaves(
    sqlite_db: Database, tiny: LoadedModel
) -> None:
    def dead(_rows: Sequence[bytes]) -> None:
        raise WorkerError("runtime", "CUDA error: an illegal memory access was encountered")

    job_id = submit(sqlite_db, [f"word{i}" for i in range(30)])
    ended = threading.Event()
    with at_work(sqlite_db, tiny, dead, lasting=True, ended=ended.set) as thread:
        wait(ended.is_set)
        assert isinstance(thread.error, WorkerError)
    assert views.job_status(sqlite_db, job_id).queued == 30
    assert max(column(sqlite_db, job_id, "failures")) == 1


def test_what_a_thread_does_can_be_asked_at_any_time(
    sqlite_db: Database, tiny: LoadedModel
) -> None:
    submit(sqlite_db)
    held = threading.Event()

    def slow(_rows: Sequence[bytes]) -> None:
        held.wait(0.05)

    with at_work(sqlite_db, tiny, slow) as thread:
        wait(lambda: thread.state.slots_used == 8 and thread.step_seconds > 0)
        assert (thread.state.model, thread.state.slots, thread.state.device) == ("tiny", 8, "fake")
        wait(lambda: thread.state.claims == 8 and thread.state.tokens_per_second > 0)
        held.set()
        wait(lambda: thread.state.claims == 0)
        assert thread.state.tokens == 8 * 12
        state = thread.state
        assert state.prompt_tokens > 0 and state.prefix_bytes > 0
    assert views.workers(sqlite_db) == []  # it has said good-bye


def test_tokens_of_prompts_that_were_not_computed_are_counted_everywhere(
    db: Database, tiny: LoadedModel
) -> None:
    word = "planetary " * 9
    job_id = submit(db, [word, word, word + "ring"])
    before = REGISTRY.get_sample_value("penstock_cached_tokens_total", {"model": "tiny"}) or 0.0
    with at_work(db, tiny, nothing) as thread:
        wait(lambda: views.job_status(db, job_id).state == "succeeded")
        wait(lambda: thread.state.claims == 0)
        state = thread.state
    usages = [each.usage for each in views.results(db, job_id)]
    spent = sorted((u.prompt_tokens, u.cached_tokens) for u in usages if u is not None)
    (prompt, none), (same, whole), (longer, part) = spent
    assert (none, whole) == (0, same) and prompt == same < longer
    assert 0 < part < longer - 1 and part % BLOCK == 0
    assert (state.prompt_tokens, state.cached_tokens) == (2 * prompt + longer, whole + part)
    after = REGISTRY.get_sample_value("penstock_cached_tokens_total", {"model": "tiny"})
    assert after == before + whole + part
    for result in views.results(db, job_id):
        usage = export.line(result)["completion"]["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) in spent
