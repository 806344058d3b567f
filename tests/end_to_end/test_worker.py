"""The worker whole: Celery's embedded transport, the engine's thread, `tiny`, a real database.

Whatever happens to it (other slots, another database, a pause, a death, lost leases, lost or
doubled nudges), the tokens, texts and log-probabilities are those of the undisturbed run.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import lifecycle
from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.queue import Queue
from orchestrator.reconciler import ReconcilerThread
from orchestrator.settings import Settings
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.orchestrator.db.builders import rows
from workers.crew import Crew
from workers.folders.folder import TINY, find_model
from workers.process import LoadedModel, LocalWorker, local_worker
from workers.recorder import Recorder
from workers.words.chat import eos_token_ids
from workers.words.tokenizer import Tokenizer

# Half of the points never end by themselves; stop strings, half emoji and two choices each.
JOB = """
name: {name}
model: tiny
dataset:
  items:
    - {{task: "Repeat exactly: Zoë 🙂🚀 crème brûlée"}}
    - {{task: "What is 31 + 44?"}}
    - {{task: "Reverse the word: tangerine"}}
params:
  messages: [{{role: user, content: "{{{{ task }}}}"}}]
  max_tokens: 40
  n: 2
  logprobs: true
  top_logprobs: 2
  stop: ["zz", "🚀 c"]
  presence_penalty: 0.1
sweep:
  temperature: [0, 2]
  logit_bias: [{{"20": 0.5}}, {{{endless}}}]
graders:
  - {{name: has_e, type: contains, expected: e}}
"""
ENDED = {"succeeded", "failed", "cancelled", "partial"}
SETTINGS = Settings(threads=1, flush_seconds=0.05, poll_seconds=0.1)
Outcome = dict[tuple[int, int], tuple[bytes, str, str, list[Any]]]


def job(name: str = "mixed") -> str:
    ends = sorted(eos_token_ids(TINY, Tokenizer(TINY)))
    return JOB.format(name=name, endless=", ".join(f'"{id}": -100' for id in ends))


def load(slots: int, settings: Settings = SETTINGS) -> LoadedModel:
    return LoadedModel.load(find_model("tiny", settings.models_dir), settings, slots=slots)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """Three slots, so that most of the job waits for one."""
    return load(3)


@pytest.fixture
def batches() -> list[int]:
    """The rows of each step that `slow` has made."""
    return []


@pytest.fixture
def slow(model: LoadedModel, batches: list[int], monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The same with steps of 3 ms at least: 24 choices take a second."""
    step = model.runner.decode

    def slowly(tokens: Any, lengths: Any) -> Any:
        batches.append(len(tokens))
        time.sleep(0.003)
        return step(tokens, lengths)

    monkeypatch.setattr(model.runner, "decode", slowly)
    return model


@pytest.fixture
def queue() -> Iterator[Queue]:
    with closing(Queue(SETTINGS)) as opened:
        yield opened


def submit(db: Database, queue: Queue, name: str = "mixed") -> str:
    made = plan(parse_job(job(name), file="job.yaml", root=Path.cwd()))
    return lifecycle.submit(db, made, queue)


def until(true: Callable[[], bool], seconds: float = 60) -> float:
    """Wait for it; how long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.01)
    return time.monotonic() - began


def state(db: Database, job_id: str) -> str:
    return views.job_status(db, job_id).state


def finish(db: Database, job_id: str, worker: LocalWorker) -> None:
    until(lambda: state(db, job_id) in ENDED or not worker.alive)
    assert worker.error is None
    assert state(db, job_id) == "succeeded"


def tokens(db: Database) -> int:
    return int(rows(db, "SELECT coalesce(sum(n_tokens), 0) FROM choices")[0][0])


def running(db: Database) -> int:
    return int(rows(db, "SELECT count(*) FROM requests WHERE state = 'running'")[0][0])


def outcome(db: Database, job_id: str) -> Outcome:
    """What succeeded: (position, choice) -> token ids, finish reason, text, log-probabilities."""
    blobs: dict[tuple[int, int], bytes] = {}
    for request, choice, blob in rows(
        db, "SELECT request_id, choice, token_ids FROM chunks ORDER BY 1, 2, token_start"
    ):
        blobs[request, choice] = blobs.get((request, choice), b"") + bytes(blob)
    found: Outcome = {}
    for result in views.results(db, job_id):
        for choice in result.choices if result.state == "succeeded" else ():
            logprobs = [entry for chunk in choice.chunks for entry in chunk.logprobs or ()]
            blob = blobs.get((result.request_id, choice.choice), b"")
            assert choice.finish_reason is not None and choice.text is not None
            assert choice.text == "".join(chunk.text for chunk in choice.chunks)
            assert len(blob) == 4 * choice.n_tokens >= 4 * len(logprobs)  # a stop string has none
            key = result.request_id % 10**9, choice.choice
            found[key] = blob, choice.finish_reason, choice.text, logprobs
    return found


@contextmanager
def nothing_left(db: Database) -> Iterator[list[LocalWorker]]:
    """Workers started in the block leave no thread, no running request, no taken slot."""
    threads, workers = set(threading.enumerate()), list[LocalWorker]()
    yield workers
    assert set(threading.enumerate()) <= threads
    assert running(db) == 0
    assert rows(db, "SELECT count(*) FROM workers WHERE stopped_at IS NULL") == [(0,)]
    for worker in workers:
        engine = worker.engine._engine
        assert not worker.alive and engine.idle and (engine.seated, engine.load) == (0, 0)


@pytest.fixture(scope="module")
def golden(
    model: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Outcome, int]]:
    """What the undisturbed job yields, and the tokens of its usage."""
    file = tmp_path_factory.mktemp("golden") / "penstock.db"
    with Database.open(f"sqlite:///{file}") as db, closing(Queue(SETTINGS)) as queue:
        job_id = submit(db, queue)
        with local_worker(SETTINGS, db, queue, model, job_id) as worker:
            finish(db, job_id, worker)
        found = outcome(db, job_id)
        status = views.job_status(db, job_id)
        assert (status.requests, status.replayed_tokens) == (12, 0)
        assert status.completion_tokens == tokens(db) == sum(len(v[0]) // 4 for v in found.values())
        assert {value[1] for value in found.values()} == {"stop", "length"}
        assert len({value[0] for value in found.values()}) > 6, "not only the greedy ones"
        yield found, status.completion_tokens


def check(db: Database, job_id: str, golden: tuple[Outcome, int]) -> None:
    assert outcome(db, job_id) == golden[0]
    assert views.job_status(db, job_id).completion_tokens == golden[1]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_neither_the_database_nor_the_slots_change_a_token(
    db: Database, queue: Queue, golden: tuple[Outcome, int], slots: int
) -> None:
    job_id = submit(db, queue)
    model = load(slots)
    with nothing_left(db) as workers, local_worker(SETTINGS, db, queue, model, job_id) as worker:
        workers.append(worker)
        finish(db, job_id, worker)
    check(db, job_id, golden)


def test_what_ends_is_graded_on_the_way(
    sqlite_db: Database, queue: Queue, model: LoadedModel
) -> None:
    db = sqlite_db
    job_id = submit(db, queue)
    with local_worker(SETTINGS, db, queue, model) as worker:
        finish(db, job_id, worker)
        until(lambda: not list(views.ungraded(db, job_id, ["has_e"])), 10)
    assert rows(db, "SELECT count(*) FROM scores") == [(24,)]


def test_a_worker_of_one_job_leaves_the_others_alone(
    sqlite_db: Database, queue: Queue, model: LoadedModel, golden: tuple[Outcome, int]
) -> None:
    db = sqlite_db
    other, mine = submit(db, queue, "other"), submit(db, queue)
    with local_worker(SETTINGS, db, queue, model, mine) as worker:
        finish(db, mine, worker)
        time.sleep(2 * SETTINGS.poll_seconds)
    check(db, mine, golden)
    status = views.job_status(db, other)
    assert (status.state, status.queued, status.completion_tokens) == ("queued", 12, 0)


def test_a_paused_job_stops_soon_and_goes_on_with_the_same_tokens(
    db: Database,
    queue: Queue,
    slow: LoadedModel,
    golden: tuple[Outcome, int],
    batches: list[int],
) -> None:
    job_id = submit(db, queue)
    with local_worker(SETTINGS, db, queue, slow) as worker:
        until(lambda: tokens(db) > 100)
        store.pause_job(db, job_id)
        assert until(lambda: running(db) == 0) < 3
        steps = len(batches)
        until(lambda: worker.engine._engine.idle, 1)
        assert len(batches) <= steps + 2, "it went on computing"
        before = tokens(db)
        assert 100 < before < golden[1]
        time.sleep(0.3)
        assert (state(db, job_id), tokens(db)) == ("paused", before)
        lifecycle.resume(db, job_id, queue)
        finish(db, job_id, worker)
    check(db, job_id, golden)


def test_a_cancelled_job_stops_soon_and_the_worker_takes_the_next(
    sqlite_db: Database, queue: Queue, slow: LoadedModel, golden: tuple[Outcome, int]
) -> None:
    db = sqlite_db
    first = submit(db, queue)
    with nothing_left(db) as workers, local_worker(SETTINGS, db, queue, slow) as worker:
        workers.append(worker)
        until(lambda: tokens(db) > 50)
        store.cancel_job(db, first)
        assert until(lambda: running(db) == 0) < 3
        assert state(db, first) == "cancelled"
        second = submit(db, queue)
        finish(db, second, worker)
    check(db, second, golden)


@pytest.mark.parametrize("step", [1, 30])
def test_a_step_that_fails_once_changes_no_token(
    db: Database,
    queue: Queue,
    model: LoadedModel,
    golden: tuple[Outcome, int],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    steps, decode = [0], model.runner.decode

    def failing(*given: Any) -> Any:
        steps[0] += 1
        if steps[0] == step:
            raise RuntimeError("for once")
        return decode(*given)

    monkeypatch.setattr(model.runner, "decode", failing)
    job_id = submit(db, queue)
    with local_worker(SETTINGS, db, queue, model) as worker:
        finish(db, job_id, worker)
    assert steps[0] > step and worker.error is None
    check(db, job_id, golden)


@pytest.mark.parametrize("step", [1, 30])
def test_an_engine_that_dies_says_so_and_another_one_goes_on(
    db: Database,
    queue: Queue,
    model: LoadedModel,
    golden: tuple[Outcome, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: int,
) -> None:
    steps, record = [0], Recorder.record

    def dying(recorder: Recorder, events: Any) -> None:
        steps[0] += 1
        if steps[0] == step:
            raise RuntimeError("the worker is gone")
        record(recorder, events)

    monkeypatch.setattr(Recorder, "record", dying)
    job_id = submit(db, queue)
    with nothing_left(db) as workers, local_worker(SETTINGS, db, queue, model) as worker:
        workers.append(worker)
        until(lambda: not worker.alive)
        assert str(worker.error) == "the worker is gone"
        assert "worker.failed" in caplog.text and "Traceback" in caplog.text
    assert state(db, job_id) in ("queued", "running")
    with local_worker(SETTINGS, db, queue, model) as second:
        finish(db, job_id, second)
    check(db, job_id, golden)


@pytest.mark.parametrize("enough", [1, 150])
def test_a_stopped_worker_leaves_nothing_behind(
    sqlite_db: Database, queue: Queue, slow: LoadedModel, golden: tuple[Outcome, int], enough: int
) -> None:
    db = sqlite_db
    job_id = submit(db, queue)
    with nothing_left(db) as workers, local_worker(SETTINGS, db, queue, slow) as worker:
        workers.append(worker)
        until(lambda: tokens(db) >= enough)
        assert running(db) > 0
    assert worker.error is None
    assert views.job_status(db, job_id).queued > 0
    with local_worker(SETTINGS, db, queue, slow) as second:
        finish(db, job_id, second)
    check(db, job_id, golden)


def test_asked_to_stop_the_engine_flushes_while_the_consumer_is_busy(
    sqlite_db: Database, queue: Queue, slow: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    db, busy, free = sqlite_db, threading.Event(), threading.Event()

    def stuck(_crew: Crew, _model: str) -> None:
        busy.set()
        free.wait(60)

    monkeypatch.setattr(Crew, "wake", stuck)
    worker = LocalWorker(SETTINGS, db, queue, slow)
    worker.start()
    submit(db, queue)
    assert busy.wait(60)
    until(lambda: running(db) > 0)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    worker.engine.join(20)  # the consumer is waited for half a minute
    left, consuming = worker.engine.is_alive(), stopping.is_alive()
    free.set()
    stopping.join(60)
    assert (left, consuming) == (False, True) and running(db) == 0


def test_lost_leases_change_no_token(
    db: Database, queue: Queue, slow: LoadedModel, golden: tuple[Outcome, int]
) -> None:
    """Again and again everything is taken away from the worker, which claims it anew."""
    job_id = submit(db, queue)
    with local_worker(SETTINGS, db, queue, slow) as worker:
        for more in range(3):
            until(lambda more=more: tokens(db) > 60 * (more + 1))  # type: ignore[misc]
            assert store.release_worker(db, worker.engine.worker_id) > 0
        finish(db, job_id, worker)
    check(db, job_id, golden)
    assert views.job_status(db, job_id).replayed_tokens > 0


def test_a_lease_lost_just_before_it_is_claimed_again_changes_no_token(
    sqlite_db: Database,
    queue: Queue,
    slow: LoadedModel,
    golden: tuple[Outcome, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine still computes what its own worker claims a second time."""
    db = sqlite_db
    claim, claims, released = store.claim, [0], [0]

    def after_the_lease(db: Database, **given: Any) -> list[store.Claimed]:
        claims[0] += 1
        if claims[0] in (3, 6):
            released[0] += store.release_worker(db, given["worker_id"])
        return claim(db, **given)

    monkeypatch.setattr(store, "claim", after_the_lease)
    job_id = submit(db, queue)
    with nothing_left(db) as workers, local_worker(SETTINGS, db, queue, slow) as worker:
        workers.append(worker)
        finish(db, job_id, worker)
    assert released[0] > 0
    check(db, job_id, golden)


def test_what_a_dead_worker_elsewhere_held_is_taken_when_its_lease_is_over(
    sqlite_db: Database,
    queue: Queue,
    model: LoadedModel,
    golden: tuple[Outcome, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    db = sqlite_db
    # Only its own lease makes it look again.
    monkeypatch.setitem(ReconcilerThread.__init__.__kwdefaults__, "interval_seconds", 3600)
    job_id = submit(db, queue)
    assert len(store.claim(db, model="tiny", worker_id="x", limit=8, lease_seconds=1.5)) == 4
    with local_worker(replace(SETTINGS, lease_seconds=2), db, queue, model) as worker:
        finish(db, job_id, worker)
    check(db, job_id, golden)


@pytest.mark.parametrize("times", [0, 3])
def test_nudges_lost_or_doubled_change_nothing(
    sqlite_db: Database,
    queue: Queue,
    model: LoadedModel,
    golden: tuple[Outcome, int],
    monkeypatch: pytest.MonkeyPatch,
    times: int,
) -> None:
    db = sqlite_db
    publish = queue._publish

    def unreliable(*given: str) -> bool:
        return all([publish(*given) for _ in range(times)])

    with local_worker(SETTINGS, db, queue, model) as worker:
        until(lambda: worker.engine._claim_at > 0)  # it has looked, and waits
        with monkeypatch.context() as patch:
            patch.setattr(queue, "_publish", unreliable)
            job_id = submit(db, queue)
            finish(db, job_id, worker)
    check(db, job_id, golden)
    assert rows(db, "SELECT max(attempt) FROM requests") == [(1,)]


def test_a_prompt_that_does_not_fit_fails_alone(
    sqlite_db: Database, queue: Queue, model: LoadedModel, golden: tuple[Outcome, int]
) -> None:
    db = sqlite_db
    made = plan(parse_job(job(), file="job.yaml", root=Path.cwd()))
    asked = [[{"role": "user", "content": item.columns["task"]}] for item in made.items()]
    lengths = [len(model.tokenizer.encode(model.template.render(each))) for each in asked]
    assert lengths[0] == max(lengths)
    narrow = replace(SETTINGS, max_context=sorted(lengths)[1] + 40)
    job_id, loaded = submit(db, queue), load(3, narrow)
    with nothing_left(db) as workers, local_worker(narrow, db, queue, loaded, job_id) as worker:
        workers.append(worker)
        until(lambda: state(db, job_id) in ENDED or not worker.alive)
    assert state(db, job_id) == "partial"
    failed = "SELECT item_id, error_code FROM requests WHERE state = 'failed'"
    assert rows(db, failed) == [(10**9, "context_length_exceeded")] * 4
    assert outcome(db, job_id) == {key: golden[0][key] for key in golden[0] if key[0] >= 4}
