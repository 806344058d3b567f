"""`penstock worker` as a process: signals, control commands, two models, a broker that is away."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator import lifecycle
from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.redis_server import RedisServer
from workers.folders.folder import TINY
from workers.words.chat import eos_token_ids
from workers.words.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
ENDLESS = ", ".join(f"'{token}': -100" for token in sorted(eos_token_ids(TINY, Tokenizer(TINY))))
SHORT = """
name: sums
model: {model}
dataset: {{items: [{{a: 12, b: 30}}, {{a: 5, b: 9}}, {{a: 40, b: 41}}]}}
params:
  messages: [{{role: user, content: "What is {{{{ a }}}} + {{{{ b }}}}?"}}]
  max_tokens: 24
graders:
  - {{name: correct, type: contains, expected: "{{{{ a + b }}}}"}}
"""
LONG = """
name: long
model: tiny
dataset: {items: [ITEMS]}
params:
  messages: [{role: user, content: "Repeat exactly: {{ w }}"}]
  max_tokens: 400
  temperature: 1.4
  logit_bias: {ENDLESS}
"""


def long(items: int) -> str:
    """A job of so many requests, each of 400 tokens."""
    words = ", ".join(f"{{w: word{i}}}" for i in range(items))
    return LONG.replace("ITEMS", words).replace("ENDLESS", ENDLESS)


@dataclass
class Fleet:
    """A folder with a database, a broker, and the workers that were started in it."""

    folder: Path
    broker: str
    db: Database

    @property
    def environ(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        return kept | {
            "PENSTOCK_DATABASE_URL": f"sqlite:///{self.folder / 'penstock.db'}",
            "PENSTOCK_BROKER_URL": self.broker,
            "PENSTOCK_FLUSH_SECONDS": "0.05",
            "PENSTOCK_POLL_SECONDS": "0.2",
            "PENSTOCK_THREADS": "1",
            "PENSTOCK_LOG": "info",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "",
        }

    def submit(self, yaml: str) -> str:
        settings = Settings(broker_url=self.broker)
        spec = parse_job(yaml, file="job.yaml", root=self.folder)
        with closing(Queue(settings)) as queue:
            return lifecycle.submit(self.db, plan(spec), queue)

    def start(self, *words: str, **env: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", "worker", *words],
                cwd=self.folder,
                env=self.environ | env,
                stdout=log,
                stderr=log,
            )

    @contextmanager
    def worker(self, *words: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
        process = self.start("--slots", "6", *(words or ("--model", "tiny")), **env)
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=60)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait(self, what: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.02)

    def wait_for_state(self, job_id: str, state: str) -> None:
        self.wait(lambda: views.job_status(self.db, job_id).state == state)

    def wait_for_work(self, job_id: str) -> None:
        """Until tokens of the job have been flushed and it runs on."""
        self.wait(lambda: views.job_status(self.db, job_id).completion_tokens > 100)
        assert views.job_status(self.db, job_id).running

    def inspect(self, command: str) -> dict[str, Any]:
        """What the workers answer, by their name; empty if none did."""
        with closing(Queue(Settings(broker_url=self.broker))) as queue:
            answers = queue.app.control.inspect(timeout=10, limit=1)._request(command)
        return dict(answers or {})

    def scalar(self, sql: str) -> Any:
        with self.db.read() as rows:
            return rows.exec_driver_sql(sql).scalar()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def fleet(tmp_path: Path, sqlite_db: Database, redis_server: RedisServer) -> Fleet:
    return Fleet(tmp_path, redis_server.url, sqlite_db)


def test_sigterm_flushes_releases_and_leaves_and_no_token_is_lost(fleet: Fleet) -> None:
    job_id = fleet.submit(long(24))
    with fleet.worker() as process:
        fleet.wait_for_work(job_id)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, fleet.log[-3000:]
    status = views.job_status(fleet.db, job_id)
    assert status.running == 0 and status.queued > 0
    assert views.workers(fleet.db) == []
    # Given back on purpose: nobody is under suspicion, every token spent is a token stored.
    assert fleet.scalar("SELECT max(idle_attempts) FROM requests") == 0
    stored = fleet.scalar("SELECT sum(n_tokens) FROM choices")
    assert stored == fleet.scalar("SELECT sum(completion_tokens) FROM usage") > 100
    with fleet.worker() as process:
        fleet.wait_for_state(job_id, "succeeded")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    assert fleet.scalar("SELECT sum(n_tokens) FROM choices") == 24 * 400
    assert fleet.scalar("SELECT sum(completion_tokens) FROM usage") == 24 * 400


@contextmanager
def locked(fleet: Fleet) -> Iterator[None]:
    """Nobody else can write: the flush of whoever leaves has to wait."""
    with closing(sqlite3.connect(fleet.folder / "penstock.db", timeout=60)) as connection:
        connection.isolation_level = None
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def test_a_second_sigterm_leaves_at_once(fleet: Fleet) -> None:
    job_id = fleet.submit(long(24))
    with fleet.worker("--model", "tiny", "--grace", "600") as process:
        fleet.wait_for_work(job_id)
        with locked(fleet):
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert views.job_status(fleet.db, job_id).running > 0  # its leases give them back


def test_when_the_grace_is_over_it_leaves(fleet: Fleet) -> None:
    job_id = fleet.submit(long(24))
    with fleet.worker("--model", "tiny", "--grace", "0.5") as process:
        fleet.wait_for_work(job_id)
        with locked(fleet):
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 1
    assert "worker.grace_over" in fleet.log


def test_ping_and_penstock_state_are_answered_while_every_slot_is_taken(fleet: Fleet) -> None:
    job_id = fleet.submit(long(400))
    with fleet.worker("--model", "tiny", "--metrics-port", "0"):
        fleet.wait_for_work(job_id)
        (answer,) = fleet.inspect("ping").values()
        assert answer == {"ok": "pong"}
        (state,) = fleet.inspect("penstock_state").values()
        (engine,) = state["engines"]
        assert (engine["model"], engine["device"], engine["slots"]) == ("tiny", "cpu", 6)
        assert engine["slots_used"] == 6 <= engine["claims"]
        assert engine["tokens"] > 100 and engine["tokens_per_second"] > 0
        assert state["memory_bytes"] > 10**7
        metrics = read_metrics(fleet)
        words = "-A orchestrator.queue inspect --timeout 4 --json penstock_state"
        said = subprocess.run(
            [Path(sys.executable).parent / "celery", *words.split()],
            cwd=fleet.folder,
            env=fleet.environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        assert "tokens_per_second" in str(json.loads(said))
        assert views.job_status(fleet.db, job_id).running, "it was to be busy all the time"
    for name in ("claims_total", "steps_total", "tokens_total", "queue_depth", "queue_running"):
        assert sample(metrics, name) > 0, name
    assert sample(metrics, "slots_used") == 6
    for name in ("batch_occupancy_bucket", "flush_seconds_sum", "queue_oldest_waiting_seconds"):
        assert f"penstock_{name}{{" in metrics
    assert "penstock_leases_lost_total" in metrics and "penstock_replayed_tokens" in metrics


def read_metrics(fleet: Fleet) -> str:
    found = re.search(r"metrics.served url=(http://127\.0\.0\.1:\d+/metrics)", fleet.log)
    assert found, fleet.log
    with urllib.request.urlopen(found[1], timeout=30) as answer:  # noqa: S310
        return str(answer.read().decode())


def sample(metrics: str, name: str) -> float:
    found = re.search(rf'^penstock_{name}{{model="tiny"}} (\S+)$', metrics, re.MULTILINE)
    assert found, f"{name} is not in\n{metrics}"
    return float(found[1])


def test_one_worker_serves_two_models(fleet: Fleet) -> None:
    shutil.copytree(TINY, fleet.folder / "models" / "other")
    with fleet.worker("--model", "tiny", "--model", "models/other") as process:
        jobs = [fleet.submit(SHORT.format(model=model)) for model in ("other", "tiny")]
        for job_id in jobs:
            fleet.wait_for_state(job_id, "succeeded")
        workers = views.live_workers(fleet.db)
        assert {worker.model for worker in workers} == {"tiny", "other"}
        assert {worker.pid for worker in workers} == {process.pid}
        (state,) = fleet.inspect("penstock_state").values()
        assert [engine["model"] for engine in state["engines"]] == ["tiny", "other"]
        # Graded by whoever took the message, without anybody waiting for it.
        fleet.wait(lambda: fleet.scalar("SELECT count(*) FROM scores") == 6)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, fleet.log[-3000:]


def test_without_a_broker_it_works_by_polling_and_connects_when_there_is_one(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    redis_server.stop()
    with fleet.worker() as process:
        job_id = fleet.submit(SHORT.format(model="tiny"))
        fleet.wait_for_state(job_id, "succeeded")
        fleet.wait(lambda: fleet.scalar("SELECT count(*) FROM scores") == 3)
        redis_server.start()
        fleet.wait(lambda: fleet.inspect("ping"))
        redis_server.kill()
        job_id = fleet.submit(SHORT.format(model="tiny"))
        fleet.wait_for_state(job_id, "succeeded")
        process.send_signal(signal.SIGTERM)  # also while it is away
        assert process.wait(timeout=60) == 0, fleet.log[-3000:]


def test_a_frozen_broker_stops_neither_work_nor_leaving(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    with fleet.worker() as process:
        fleet.wait(lambda: fleet.inspect("ping"))
        redis_server.freeze()
        try:
            job_id = fleet.submit(SHORT.format(model="tiny"))
            fleet.wait_for_state(job_id, "succeeded")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, fleet.log[-3000:]
        finally:
            redis_server.thaw()


def test_a_worker_refuses_a_redis_that_may_drop_keys(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    redis_server.command("CONFIG", "SET", "maxmemory", "50mb")
    redis_server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with fleet.worker() as process:
        assert process.wait(timeout=60) == 1
    (line,) = fleet.log.splitlines()
    assert line.startswith("penstock: ") and "maxmemory-policy noeviction" in line
