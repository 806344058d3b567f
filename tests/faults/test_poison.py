"""Requests that break whoever works on them: they fail alone, and their batch-mates succeed."""

import pytest

from tests.faults.conftest import MakeStage
from tests.faults.harness import WAIT_SECONDS, Stage, many
from tests.faults.invariants import PER_JOB, Result

CODES = {
    "exception": "worker_error",
    "SystemExit": "worker_error",
    "segfault": "poison",
    "endless": "poison",
    "nan": "nan_logits",
}
GUILTY_OF_A_JOB = 4


@pytest.fixture
def impatient(job: str) -> str:
    """A job that gives up a failing request soon."""
    return job + "limits: {max_attempts: 1}\n"


@pytest.mark.parametrize("kind", CODES)
def test_poison(kind: str, make_stage: MakeStage, impatient: str, golden: Result) -> None:
    stage = make_stage(f"poison: {kind}", "postgresql", job=impatient)
    poisoned(stage, golden, kind, 2)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", CODES)
def test_poison_a_hundred_times(
    kind: str, make_stage: MakeStage, impatient: str, golden: Result
) -> None:
    poisoned(make_stage(f"poison: {kind}", "postgresql", job=impatient), golden, kind, many(100))


def poisoned(stage: Stage, golden: Result, kind: str, times: int) -> None:
    """A few guilty requests in each job of 48; so many jobs at once as make `times` of them."""
    jobs = range(1, 1 + -(-times // GUILTY_OF_A_JOB))
    places = [(job, place) for job in jobs for place in range(len(golden) // 2)]
    guilty = [job * PER_JOB + place for job, place in _spread(stage, places, times)]
    env = {
        "FAULT_POISON": f"{kind}:{','.join(map(str, guilty))}",
        "FAULT_STEP_SECONDS": "0.002",
        "PENSTOCK_STALL_SECONDS": "1",
    }
    with stage.working(2, **env):
        for _ in jobs:
            stage.submit()
        stage.finish(WAIT_SECONDS + 12 * (times - 2))
    for seconds in _lives(stage, guilty):
        stage.row.times += 1
        stage.row.recovered.append(seconds)
    stage.check(golden, dict.fromkeys(guilty, CODES[kind]))


def _spread(stage: Stage, places: list[tuple[int, int]], times: int) -> list[tuple[int, int]]:
    """Some places of each job, other ones in each: more in a row would be the machine's fault."""
    chosen: list[tuple[int, int]] = []
    for job in sorted({job for job, _ in places}):
        own = [each for each in places if each[0] == job]
        chosen += stage.rng.sample(own, min(GUILTY_OF_A_JOB, times - len(chosen)))
    return chosen


def _lives(stage: Stage, guilty: list[int]) -> list[float]:
    """Seconds from the first claim of each guilty request until it had failed."""
    found = stage.query("SELECT id, started_at, finished_at FROM requests WHERE state = 'failed'")
    ended = {id: (end - start).total_seconds() for id, start, end in found}
    return [ended[id] for id in guilty if id in ended]
