"""Submitting to workers elsewhere and steering from outside: real processes, a real model."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator import control
from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.db.views import JobStatus
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from tests.end_to_end.shell import JOB, Shell, long_job
from tests.redis_server import RedisServer

PATIENCE_SECONDS = 120
FAST = {"PENSTOCK_LEASE_SECONDS": "2", "PENSTOCK_THREADS": "1"}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / "sums.yaml").write_text(JOB)
    return Shell(tmp_path)


def eventually(found: Callable[[], Any], running: subprocess.Popen[str]) -> Any:
    """What `found` answers as soon as it is true; fails when the process has ended."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not (answer := found()):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    return answer


@contextmanager
def serving(shell: Shell, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process for the time of the block; it leaves with 0 when it is asked to."""
    process = shell.start(*arguments, **{**FAST, **env})
    try:
        yield process
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, err
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def submitted(shell: Shell, file: str, **env: str) -> str:
    ended = shell("submit", file, **env)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("job_") and ended.out.count("\n") == 1
    return ended.out.strip()


def status(shell: Shell, job: str, **env: str) -> dict[str, Any]:
    ended = shell("status", job, "--json", **env)
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


@contextmanager
def looking(shell: Shell, job: str, url: str | None = None) -> Iterator[Callable[[], JobStatus]]:
    """The job's status, read here: starting a process for each look takes too long."""
    with Database.open(url or f"sqlite:///{shell.folder / 'penstock.db'}") as db:
        yield lambda: views.job_status(db, job)


def test_one_machine_in_one_command(shell: Shell) -> None:
    job = submitted(shell, "sums.yaml")
    (reason,) = status(shell, job)["waiting"]
    assert reason == "no live worker serves model tiny"
    assert f"waits: {reason}\n" in shell("status", job).out
    with serving(shell, "up", "--slots", "4") as process, looking(shell, job) as look:
        eventually(lambda: look().state == "succeeded", process)
        eventually(lambda: _is_scored(status(shell, job)), process)
        assert status(shell, job)["waiting"] == []
        (worker,) = json.loads(shell("workers", "--json").out)
        assert (worker["model"], worker["slots"], worker["pid"]) == ("tiny", 4, process.pid)
        assert worker["alive"] is True
        assert f"{worker['hostname']}:{process.pid}" in shell("workers").out
    assert json.loads(shell("workers", "--json").out) == []


def _is_scored(found: dict[str, Any]) -> bool:
    """Each of the 16 choices of the job of sums has its score."""
    counted = [point["scores"].get("correct") or {"n": 0} for point in found["points"]]
    return sum(each["n"] for each in counted) == 16


def test_a_job_is_steered_where_nobody_works(shell: Shell) -> None:
    job = submitted(shell, "sums.yaml")
    assert shell("pause", "sums").out == f"paused {job}\n"
    found = status(shell, job)
    assert found["state"] == "paused" and found["waiting"] == ["paused"]
    assert shell("resume", "sums", "--detach").out == f"resumed {job}\n"
    assert status(shell, job)["state"] == "queued"
    assert shell("retry", job).out == f"retried 0 requests of {job}\n"
    assert shell("cancel", job[:-2], "--reason", "wrong prompt").out == f"cancelled {job}\n"
    found = status(shell, job)
    assert (found["state"], found["cancelled"], found["waiting"]) == ("cancelled", 8, [])
    assert "cancelled: wrong prompt\n" in shell("status", job).out
    for command in (("cancel",), ("pause",), ("retry",), ("resume", "--detach")):
        ended = shell(*command, job)
        assert (ended.code, ended.out) == (2, "")
        assert f"job '{job}': cancelled" in ended.err and ended.err.count("\n") == 1
    ended = shell("cancel", "nothing")
    assert (ended.code, ended.err) == (2, "penstock: job 'nothing' does not exist\n")


def test_cancel_and_pause_reach_what_is_running(shell: Shell) -> None:
    long_job(shell.folder, 400)
    job = submitted(shell, "long.yaml")
    with serving(shell, "up", "--slots", "4") as process, looking(shell, job) as look:
        eventually(lambda: look().completion_tokens, process)
        assert shell("pause", job).code == 0
        paused = eventually(lambda: _at_rest(look()), process)
        assert (paused.state, paused.cancelled) == ("paused", 0)
        assert shell("resume", job, "--detach").code == 0
        eventually(lambda: look().completion_tokens > paused.completion_tokens, process)
        assert shell("cancel", job).code == 0
        cancelled = eventually(lambda: _at_rest(look()), process)
        assert cancelled.state == "cancelled" and cancelled.cancelled > 0
        kept = "SELECT count(*) FROM request_text WHERE state = 'cancelled' AND n_tokens > 0"
        assert shell.rows(kept)[0][0] > 0, "the text so far stays"
        again = submitted(shell, "sums.yaml")
        with looking(shell, again) as look_again:
            eventually(lambda: look_again().state == "succeeded", process)


def _at_rest(found: JobStatus) -> JobStatus | None:
    return None if found.running else found


def test_a_scheduler_alone_takes_back_what_a_killed_worker_held(shell: Shell) -> None:
    long_job(shell.folder, 400)
    job = submitted(shell, "long.yaml")
    with looking(shell, job) as look:
        killed = shell.start("up", "--slots", "4", **FAST)
        eventually(lambda: look().completion_tokens, killed)
        killed.kill()
        killed.communicate()
        assert look().running > 0
        with serving(shell, "scheduler", "--interval", "0.2") as process:
            assert eventually(lambda: _at_rest(look()), process).queued > 0


def test_up_serves_the_urls_of_the_environment(shell: Shell, postgresql_url: str) -> None:
    with RedisServer() as redis:
        urls = {"PENSTOCK_DATABASE_URL": postgresql_url, "PENSTOCK_BROKER_URL": redis.url}
        with (
            serving(shell, "up", "--slots", "4", **urls) as process,
            serving(shell, "scheduler", "--interval", "0.5", **urls),
        ):
            job = submitted(shell, "sums.yaml", **urls)
            with looking(shell, job, postgresql_url) as look:
                eventually(lambda: look().state == "succeeded", process)
            eventually(lambda: _is_scored(status(shell, job, **urls)), process)
    assert not (shell.folder / "penstock.db").exists()


@pytest.mark.parametrize(
    ("lease", "options", "every"),
    [("30", (), "5"), ("2", (), "1"), ("2", ("--interval", "7"), "7")],
)
def test_a_scheduler_ticks_twice_within_a_lease_unless_told_otherwise(
    shell: Shell, lease: str, options: tuple[str, ...], every: str
) -> None:
    process = shell.start("scheduler", *options, PENSTOCK_LEASE_SECONDS=lease)
    assert process.stderr is not None
    assert process.stderr.readline() == f"scheduler: a look every {every} s\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_so_does_the_one_inside_up(sqlite_db: Database) -> None:
    settings = Settings(lease_seconds=2)
    with closing(Queue(settings)) as queue, control._ticking(settings, sqlite_db, queue):
        assert queue.app.conf.beat_schedule["tick"]["schedule"] == 1


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_of_everything_share_a_job_and_repeat_nothing(
    shell: Shell, kind: str, request: pytest.FixtureRequest
) -> None:
    """Two workers, each with a reconciler, and two schedulers, on one database."""
    url = str(request.getfixturevalue(f"{kind}_url"))
    env = {"PENSTOCK_DATABASE_URL": url, "PENSTOCK_LEASE_SECONDS": "20"}
    long_job(shell.folder, 40)
    with (
        Database.open(url) as db,
        serving(shell, "up", "--slots", "4", **env) as first,
        serving(shell, "up", "--slots", "4", **env),
        serving(shell, "scheduler", "--interval", "0.2", **env),
        serving(shell, "scheduler", "--interval", "0.2", **env),
    ):
        eventually(lambda: len(views.live_workers(db)) == 2, first)
        job = submitted(shell, "long.yaml", **env)
        eventually(lambda: views.job_status(db, job).state == "succeeded", first)
        done = views.requests(db, job)
        assert {(each.attempt, each.epoch, each.n_tokens) for each in done} == {(1, 1, 300)}
        assert len({each.worker_id for each in done}) == 2
        assert views.job_status(db, job).replayed_tokens == 0


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (JOB.replace("name: sums", "name: [x]"), (), "bad.yaml:2: name: expected "),
        (JOB.replace("  n: 2", "  logit_bias: {99999: 1}"), (), "Invalid key in 'logit_bias'"),
        (JOB.replace("tokens: 24", "tokens: 100000"), (), "maximum context length is"),
        (JOB, ("--model", "none"), "model 'none' does not exist"),
    ],
)
def test_what_can_be_told_at_the_door_is_refused_there(
    shell: Shell, text: str, arguments: tuple[str, ...], said: str
) -> None:
    (shell.folder / "bad.yaml").write_text(text)
    ended = shell("submit", "bad.yaml", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err and ended.err.count("\n") == 1
    assert not (shell.folder / "penstock.db").exists()


def test_a_model_that_is_elsewhere_is_checked_there(shell: Shell) -> None:
    (shell.folder / "far.yaml").write_text(JOB.replace("model: tiny", "model: far"))
    ended = shell("submit", "far.yaml")
    assert ended.code == 0 and ended.out.startswith("job_")
    assert ended.err.splitlines() == [
        "model far is not here: its prompts are checked when they are claimed",
        "no live worker serves model far yet: penstock worker --model far",
    ]
