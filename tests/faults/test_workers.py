"""Workers killed at random, killed at a named point, and frozen beyond their leases."""

import signal
import time

import pytest

from tests.faults.conftest import MakeStage
from tests.faults.failpoints import WORKER_POINTS
from tests.faults.harness import LEASE_SECONDS, Stage, many
from tests.faults.invariants import Result

BOTH = pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
ROUND = 10


@BOTH
def test_kill_of_a_worker(kind: str, make_stage: MakeStage, golden: Result) -> None:
    kills(make_stage("kill -9 of a worker", kind), golden, ROUND)


@BOTH
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kill_of_a_worker_five_hundred_times(
    kind: str, make_stage: MakeStage, golden: Result
) -> None:
    kills(make_stage("kill -9 of a worker", kind), golden, many(500))


@BOTH
def test_kill_at_every_point(kind: str, make_stage: MakeStage, golden: Result) -> None:
    points(make_stage("", kind), golden, 1)


@BOTH
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kill_at_every_point_twenty_times(kind: str, make_stage: MakeStage, golden: Result) -> None:
    points(make_stage("", kind), golden, many(20))


@pytest.mark.parametrize(("kind", "times"), [("sqlite", 2), ("postgresql", 3)])
def test_zombie(kind: str, times: int, make_stage: MakeStage, golden: Result) -> None:
    zombies(make_stage("zombie: SIGSTOP beyond the lease, then SIGCONT", kind), golden, times)


@BOTH
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_zombie_a_hundred_times(kind: str, make_stage: MakeStage, golden: Result) -> None:
    zombies(make_stage("zombie: SIGSTOP beyond the lease, then SIGCONT", kind), golden, many(100))


def kills(stage: Stage, golden: Result, times: int) -> None:
    """A random worker of two, after a random number of tokens; checked every few kills."""
    stage.submit()
    with stage.working(2) as fleet:
        for kill in range(1, times + 1):
            stage.amid_work(stage.rng.randrange(1, 200))
            stage.kill(stage.rng.choice(fleet.workers))
            if kill % 50 == 0:
                stage.finish()
                stage.check(golden)
        stage.finish()
    stage.check(golden)


def points(stage: Stage, golden: Result, times: int) -> None:
    """A guest that kills itself at each point in turn, while another worker goes on.

    The same request is not among those of three dead guests in a row; see `Stage.prove`.
    """
    stage.submit()
    with stage.working(1) as fleet:
        for point in WORKER_POINTS:
            stage.next_row(f"kill -9 at {point}")
            for _ in range(times):
                stage.prove()
                first = stage.rng.randrange(1, 12) if point.startswith("commit") else 1
                guest = fleet.join(FAULT_AT=f"{point}:{first}")
                stage.wait(lambda guest=guest: guest.ended.is_set() or stage.keep_busy(), point)
                assert guest.code == -signal.SIGKILL, guest.said()
                stage.fault(stage.held(guest))
        stage.finish()
    stage.check(golden)


def zombies(stage: Stage, golden: Result, times: int) -> None:
    """Frozen until others have its work; then it wakes, and writes nothing of what it lost."""
    stage.submit()
    held: set[tuple[int, int]] = set()
    with stage.working(3) as fleet:
        while stage.row.times < times:
            stage.amid_work(stage.rng.randrange(20, 200))
            chosen = stage.rng.sample(fleet.workers, min(2, times - stage.row.times))
            for zombie in chosen:
                held |= set(stage.held(zombie).items())
                stage.kill(zombie, signal.SIGSTOP)
            time.sleep(LEASE_SECONDS + 1.5)
            for zombie in chosen:
                zombie.signal(signal.SIGCONT)
        stage.finish()
        # Frozen amid a transaction it keeps the others out, so that nothing of it is taken.
        epochs = dict(stage.query("SELECT id, epoch FROM requests"))
        if any(epochs[request] > epoch for request, epoch in held):
            stage.wait(lambda: fleet.count("request.lost") > 0, "line of a lost request")
    stage.check(golden)
