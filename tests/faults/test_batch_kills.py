"""Batches and kill -9: of who looks after them, at every point, and of the worker, again and again.

Every custom_id stands exactly once in the output and the error file, and what it says is what an
undisturbed run says.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator import batches
from orchestrator.batches import Batches, look
from orchestrator.db import batches as batch_rows
from orchestrator.db.database import Database
from tests.api.batching import answers, entered, jsonl, line, looking_after, work
from tests.faults.harness import SETTINGS
from tests.faults.processes import ROOT, Fleet, Launcher
from tests.orchestrator.db.builders import rows

LEASE_SECONDS = 0.5
IDS = ["a", "b", "c"]
Keep = Callable[[Batches, int], int]
KEEPER = """
import json, os, signal, sys
from pathlib import Path
from orchestrator.batches import look
from orchestrator.db.database import Database
from sqlalchemy.engine.default import DefaultDialect
from tests.api.batching import looking_after

left = 0

def passed():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def around(owner, name):
    real = getattr(owner, name)
    def patched(*args):
        passed()
        result = real(*args)
        passed()
        return result
    setattr(owner, name, patched)

def keep(url, folder):
    with Database.open(url) as db, looking_after(db, Path(folder), lease_seconds=0.5) as my:
        around(DefaultDialect, "do_commit")
        around(os, "replace")
        look(my)

for line in sys.stdin:
    url, folder, left = json.loads(line)
    pid = os.fork()
    if pid == 0:
        keep(url, folder)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def keep() -> Iterator[Keep]:
    """One look in a process that kills itself at a point: its exit code."""
    argv = [sys.executable, "-c", KEEPER]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        argv, cwd=ROOT, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        orders, codes = keeper.stdin, keeper.stdout

        def kept(my: Batches, point: int) -> int:
            print(json.dumps([_url(my.db), str(my.folder), point]), file=orders, flush=True)
            return int(codes.readline())

        yield kept


@pytest.fixture
def rng(fault_seed: int) -> random.Random:
    print(f"FAULT_SEED={fault_seed}")
    return random.Random(fault_seed)


@pytest.fixture
def sqlite_files(sqlite_db: Database, tmp_path: Path) -> Iterator[Batches]:
    with looking_after(sqlite_db, tmp_path / "files", lease_seconds=LEASE_SECONDS) as my:
        yield my


@pytest.mark.parametrize("phase", ["validating", "finalizing"])
def test_killed_at_every_point(phase: str, sqlite_files: Batches, keep: Keep) -> None:
    """Before and after each commit and each rename of one look: the next one goes on.

    One job a batch, every line once, and no file that nobody names but for the sweep.
    """
    kills = 0
    while _killed(sqlite_files, keep, phase, kills + 1):
        kills += 1
    print(f"{phase}: killed at {kills} points")
    assert kills >= 8
    # What was planned half way is never seen, and removed after a day.
    planned = "SELECT count(*) FROM jobs WHERE planned_at IS NOT NULL"
    assert rows(sqlite_files.db, planned) == [(kills + 1,)]
    _no_strays(sqlite_files)


@pytest.mark.parametrize("phase", ["validating", "finalizing"])
def test_killed_at_a_random_point_on_postgresql(
    phase: str, postgresql_db: Database, tmp_path: Path, rng: random.Random, keep: Keep
) -> None:
    with looking_after(postgresql_db, tmp_path / "files", lease_seconds=LEASE_SECONDS) as my:
        for _ in range(3):
            _killed(my, keep, phase, rng.randrange(1, 12))
        _no_strays(my)


def _killed(my: Batches, keep: Keep, phase: str, point: int) -> bool:
    """A batch whose keeper dies at that point; False when there is no such point any more."""
    batch_id = entered(my, jsonl(map(line, IDS)))
    if phase == "finalizing":
        look(my)
        _worked(my)
    code = keep(my, point)
    assert code in (0, -signal.SIGKILL)
    batch = _settled(my, batch_id)
    assert batch.status == "completed"
    output, errors = answers(my, batch)
    assert sorted(each["custom_id"] for each in (*output, *errors)) == IDS
    return code != 0


def _url(db: Database) -> str:
    return db.engine.url.set(drivername=db.dialect).render_as_string(hide_password=False)


def _settled(my: Batches, batch_id: str) -> batch_rows.Batch:
    """Look from here on, with a hand in a worker's place, until the batch has ended."""
    deadline = time.monotonic() + 60
    while not (batch := batch_rows.batch(my.db, batch_id)).ended:
        assert time.monotonic() < deadline, batch.status
        look(my)
        _worked(my)
        time.sleep(0.05)
    return batch


def _worked(my: Batches) -> None:
    work(my.db, 1, "poison")
    work(my.db, 10)


def _no_strays(my: Batches) -> None:
    batches.sweep_files(my, stray_seconds=-1)
    named = {row[0] for row in rows(my.db, "SELECT id FROM files")}
    assert {path.name for path in my.folder.iterdir()} == named


MakeFleet = Callable[[Batches], Fleet]


@pytest.fixture
def make_fleet(launcher: Launcher, tmp_path: Path) -> Iterator[MakeFleet]:
    """One worker, started again whenever it dies, on the database that a batch is in."""
    fleets: list[Fleet] = []

    def make(my: Batches) -> Fleet:
        folder = tmp_path / f"fleet {len(fleets)}"
        folder.mkdir()
        slow = {"FAULT_STEP_SECONDS": "0.001", "PENSTOCK_SLOTS": "16"}
        url = my.db.engine.url.set(drivername=my.db.dialect).render_as_string(hide_password=False)
        fleets.append(
            Fleet(launcher, folder, 1, {**SETTINGS, **slow, "PENSTOCK_DATABASE_URL": url})
        )
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


def test_kills_of_the_worker(
    sqlite_url: str, tmp_path: Path, make_fleet: MakeFleet, rng: random.Random
) -> None:
    worker_kills(sqlite_url, tmp_path, make_fleet, rng, 300)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_kills_of_the_worker_in_5000_lines(
    sqlite_url: str, tmp_path: Path, make_fleet: MakeFleet, rng: random.Random
) -> None:
    worker_kills(sqlite_url, tmp_path, make_fleet, rng, 5000)


def worker_kills(
    url: str, folder: Path, make_fleet: MakeFleet, rng: random.Random, count: int
) -> None:
    """The same lines twice: undisturbed, and with the worker killed three times in between."""
    wanted = [f"line {n}" for n in range(count)]
    rng.shuffle(wanted)
    long = set(rng.sample(wanted, count // 50))
    content = jsonl(_line(rng, custom_id, custom_id in long) for custom_id in wanted)
    with Database.open(url) as db, looking_after(db, folder / "files") as my:
        whole = _run(my, make_fleet, content, [])
        tenths = (1, 4, 7)  # a tenth of the lines at least lies between two kills
        goals = [rng.randrange(count * n // 10, count * (n + 2) // 10) for n in tenths]
        killed = _run(my, make_fleet, content, goals)
    assert sorted(custom_id for custom_id, _, _ in killed) == sorted(wanted)
    assert {kind for _, kind, _ in killed} == {"output", "error"}
    assert sorted(killed) == sorted(whole)


def _line(rng: random.Random, custom_id: str, long: bool) -> dict[str, Any]:
    """A short sum with its own seed, or one that no context has room for."""
    a, b = rng.randrange(100), rng.randrange(100)
    asked = "a long way " * 2000 if long else f"What is {a} + {b}?"
    messages = [{"role": "user", "content": asked}]
    seed = rng.randrange(2**31)
    return line(custom_id, messages=messages, seed=seed, temperature=rng.choice([0, 1]))


def _run(
    my: Batches, make_fleet: MakeFleet, content: bytes, goals: list[int]
) -> list[tuple[str, str, str]]:
    """(custom_id, file, what it says) of every line; a kill when so many requests have ended."""
    batch_id = entered(my, content)
    look(my)
    assert batch_rows.batch(my.db, batch_id).status == "in_progress"
    began, fleet = time.monotonic(), make_fleet(my)
    with closing(fleet):
        for goal in goals:
            _wait(lambda goal=goal: _ended(my, batch_id) >= goal, fleet)
            struck = fleet.workers[0]
            struck.kill()
            _wait(lambda struck=struck: fleet.workers[0] is not struck, fleet)
        _wait(lambda: look(my) >= 0 and batch_rows.batch(my.db, batch_id).ended, fleet)
    batch = batch_rows.batch(my.db, batch_id)
    assert batch.status == "completed"
    print(f"{batch.lines} lines, {len(goals)} kills: {time.monotonic() - began:.1f} s")
    assert fleet.starts == 1 + len(goals)
    output, errors = answers(my, batch)
    told = [("output", each) for each in output] + [("error", each) for each in errors]
    return [(each["custom_id"], file, _said(each)) for file, each in told]


def _said(answer: dict[str, Any]) -> str:
    """The answer without what every run has of its own."""
    response = answer["response"]
    body = {k: v for k, v in response["body"].items() if k not in ("id", "created")}
    if "usage" in body:  # what was found in the cache differs, and is no part of what was said
        body["usage"] = {k: v for k, v in body["usage"].items() if not k.endswith("_details")}
    return json.dumps([response["status_code"], body, answer["error"]])


def _ended(my: Batches, batch_id: str) -> int:
    query = (
        "SELECT count(*) FROM requests r JOIN batches b ON b.job_id = r.job_id"
        f" WHERE b.id = '{batch_id}' AND r.finished_at IS NOT NULL"
    )
    return int(rows(my.db, query)[0][0])


def _wait(true: Callable[[], bool], fleet: Fleet, seconds: float = 1500) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, fleet.said()
        time.sleep(0.05)
