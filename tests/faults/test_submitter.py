"""The submitter killed: a job is there as a whole or not at all, and no nudge is needed.

Planning happens in the submitter, so that there is no planning task to kill besides it.
"""

import pytest

from orchestrator.db import store
from orchestrator.db.database import Database
from tests.faults.conftest import MakeStage
from tests.faults.failpoints import SUBMITTER_POINTS
from tests.faults.harness import SETTINGS, Stage, many
from tests.faults.invariants import Result
from tests.faults.processes import Process
from tests.redis_server import RedisServer

BOTH = pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
LARGE = """
name: large
model: nobody-serves-it
dataset:
  items:
ITEMS
params:
  messages: [{role: user, content: "{{ task }}"}]
  max_tokens: 4
sweep:
  seed: [SEEDS]
"""


@pytest.mark.parametrize(("kind", "times"), [("sqlite", 2), ("postgresql", 3)])
def test_kill_of_the_submitter(
    kind: str, times: int, make_stage: MakeStage, golden: Result
) -> None:
    kills(make_stage("kill -9 of the submitter", kind), golden, times)


@BOTH
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kill_of_the_submitter_a_hundred_times(
    kind: str, make_stage: MakeStage, golden: Result
) -> None:
    kills(make_stage("kill -9 of the submitter", kind), golden, many(100))


@BOTH
def test_kill_around_the_wake(
    kind: str, make_stage: MakeStage, golden: Result, redis: RedisServer
) -> None:
    wakes(make_stage("", kind, redis.url), golden, 1)


@BOTH
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kill_around_the_wake_twenty_times(
    kind: str, make_stage: MakeStage, golden: Result, redis: RedisServer
) -> None:
    wakes(make_stage("", kind, redis.url), golden, many(20))


def kills(stage: Stage, golden: Result, times: int) -> None:
    """Killed between its transactions; what it leaves is never claimed, and can be removed."""
    items = "\n".join(f'    - {{task: "Repeat exactly: {n}"}}' for n in range(60))
    text = LARGE.replace("ITEMS", items).replace("SEEDS", ", ".join(map(str, range(100))))
    (stage.folder / "large.yaml").write_text(text, encoding="utf-8")
    with stage.working(1):
        while stage.row.times < times:
            goal = stage.rng.randrange(0, 5000)
            submitter = submit(stage, "large.yaml")
            stage.wait(lambda s=submitter, n=goal: s.code is not None or _rows(stage) > n, "rows")
            submitter.kill()
            if submitter.code == -9 and not _planned(stage):
                stage.fault({})
            _sweep(stage)
        assert submit(stage, "job.yaml").wait() == 0
        stage.finish()
    stage.check(golden)


def wakes(stage: Stage, golden: Result, times: int) -> None:
    """The job is committed, its submitter gone: a worker finds it."""
    with stage.working(2, FAULT_STEP_SECONDS="0"):
        for point in SUBMITTER_POINTS:
            stage.next_row(f"kill -9 at {point}")
            for _ in range(times):
                submitter = submit(stage, "job.yaml", FAULT_AT=point)
                assert submitter.wait() == -9, submitter.said()
                stage.fault()
                stage.finish()
    stage.note_jobs()
    assert len(stage.jobs) == times * len(SUBMITTER_POINTS)
    stage.check(golden)


def submit(stage: Stage, file: str, **env: str) -> Process:
    """`penstock submit FILE` as a process of its own."""
    env = {**SETTINGS, **stage.env, **env}
    log = stage.folder / "submit.log"
    return stage.launcher.start("submit", file, env=env, cwd=stage.folder, log=log)


def _rows(stage: Stage) -> int:
    return int(stage.query("SELECT count(*) FROM requests")[0][0])


def _planned(stage: Stage) -> bool:
    wanted = "SELECT count(*) FROM jobs WHERE name = 'large' AND planned_at IS NOT NULL"
    return stage.query(wanted) != [(0,)]


def _sweep(stage: Stage) -> None:
    """Whole or invisible; then removed, so that every round begins alike."""
    broken = """SELECT count(*) FROM jobs j WHERE planned_at IS NOT NULL AND n_requests <>
        (SELECT count(*) FROM requests r WHERE r.job_id = j.id)"""
    assert stage.query(broken) == [(0,)]
    claimed = "SELECT count(*) FROM requests r JOIN jobs j ON j.id = r.job_id WHERE attempt > 0"
    assert stage.query(claimed) == [(0,)]
    with Database.open(stage.settings.database_url) as db:
        store.remove_unplanned(db, older_than_seconds=0)
        with db.write() as tx:
            tx.exec_driver_sql("DELETE FROM jobs WHERE name = 'large'")
    assert _rows(stage) == 0
