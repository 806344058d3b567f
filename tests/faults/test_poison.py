"""Requests that break whoever works on them: they fail alone, and their batch-mates succeed."""

import pytest

from tests.faults.conftest import MakeStage
from tests.faults.harness import Stage
from tests.faults.invariants import Result

CODES = {
    "exception": "worker_error",
    "SystemExit": "worker_error",
    "segfault": "poison",
    "endless": "poison",
    "nan": "nan_logits",
}


@pytest.fixture
def impatient(job: str) -> str:
    """A job that gives up a failing request soon."""
    return job + "limits: {max_attempts: 1}\n"


@pytest.mark.parametrize("kind", CODES)
def test_poison(kind: str, make_stage: MakeStage, impatient: str, golden: Result) -> None:
    stage = make_stage(f"poison: {kind}", "postgresql", job=impatient)
    poisoned(stage, golden, kind, 1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", CODES)
def test_poison_a_hundred_times(
    kind: str, make_stage: MakeStage, impatient: str, golden: Result
) -> None:
    poisoned(make_stage(f"poison: {kind}", "postgresql", job=impatient), golden, kind, 100)


def poisoned(stage: Stage, golden: Result, kind: str, times: int) -> None:
    """Two guilty requests among 48, somewhere; the same ones in every job of a stage."""
    guilty = stage.rng.sample(range(len(golden) // 2), 2)
    poison = f"{kind}:{','.join(map(str, guilty))}"
    env = {"FAULT_POISON": poison, "FAULT_STEP_SECONDS": "0.002", "PENSTOCK_STALL_SECONDS": "1"}
    with stage.working(2, **env):
        for _ in range(times):
            stage.submit()
            stage.fault()
            stage.finish()
    stage.check(golden, dict.fromkeys(guilty, CODES[kind]))
