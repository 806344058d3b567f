"""Redis away, emptied, frozen, full, or never there; nudges lost, doubled, late and out of order.

Nudges are disturbed like that in all of these tests. The rows carry the work, so every job ends;
and when Redis is back, so are the workers' ears.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from orchestrator.queue import Queue
from tests.faults.conftest import MakeStage
from tests.faults.harness import Stage, many
from tests.faults.invariants import Result
from tests.redis_server import RedisServer

FROZEN_SECONDS, LONG_FROZEN_SECONDS = 5.0, 30.0


@contextmanager
def restart(redis: RedisServer, seconds: float) -> Iterator[None]:
    redis.kill()
    yield
    time.sleep(1)
    redis.start()


@contextmanager
def flushall(redis: RedisServer, seconds: float) -> Iterator[None]:
    redis.command("FLUSHALL")
    yield


@contextmanager
def frozen(redis: RedisServer, seconds: float) -> Iterator[None]:
    redis.freeze()
    until = time.monotonic() + seconds
    yield
    time.sleep(max(0.0, until - time.monotonic()))
    redis.thaw()


@contextmanager
def out_of_memory(redis: RedisServer, seconds: float) -> Iterator[None]:
    redis.command("CONFIG", "SET", "maxmemory", "1")
    yield
    time.sleep(1)
    redis.command("CONFIG", "SET", "maxmemory", "0")


FAULTS = {
    "Redis killed and started again": restart,
    "Redis: FLUSHALL": flushall,
    "Redis frozen": frozen,
    "Redis out of memory": out_of_memory,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_redis(fault: str, make_stage: MakeStage, golden: Result, redis: RedisServer) -> None:
    disturbed(make_stage(fault, "postgresql", redis.url), redis, golden, 1, FROZEN_SECONDS)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", FAULTS)
def test_redis_twenty_times(
    fault: str, make_stage: MakeStage, golden: Result, redis: RedisServer
) -> None:
    stage = make_stage(fault, "postgresql", redis.url)
    disturbed(stage, redis, golden, many(20), LONG_FROZEN_SECONDS)


def test_redis_absent_from_the_start(
    make_stage: MakeStage, golden: Result, redis: RedisServer
) -> None:
    absent(make_stage("Redis absent from the start", "postgresql", redis.url), redis, golden, 1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_redis_absent_from_the_start_twenty_times(
    make_stage: MakeStage, golden: Result, redis: RedisServer
) -> None:
    stage = make_stage("Redis absent from the start", "postgresql", redis.url)
    absent(stage, redis, golden, many(20))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_nudges_lost_doubled_late_and_out_of_order(
    kind: str, make_stage: MakeStage, golden: Result, redis: RedisServer
) -> None:
    """As in every test with Redis, with nothing else to disturb."""
    stage = make_stage("nudges lost, doubled, late, out of order", kind, redis.url)
    with stage.working(2, PENSTOCK_POLL_SECONDS="0.5"):
        for _ in range(3):
            stage.submit()
            stage.fault()
        stage.finish()
    stage.check(golden)


def absent(stage: Stage, redis: RedisServer, golden: Result, times: int) -> None:
    """A fleet begins without a broker, and hears it when it comes."""
    for _ in range(times):
        redis.kill()
        with stage.working(2) as fleet:
            stage.submit()
            stage.fault()
            stage.finish()
            redis.start()
            hears(stage, len(fleet.workers))
    stage.check(golden)


def disturbed(stage: Stage, redis: RedisServer, golden: Result, times: int, seconds: float) -> None:
    """Amid work; a job submitted meanwhile is accepted and ends, and then workers hear again."""
    stage.submit()
    with stage.working(2) as fleet:
        for _ in range(times):
            stage.amid_work()
            with FAULTS[stage.row.fault](redis, seconds):
                stage.fault()
                stage.submit()
                stage.amid_work()
            hears(stage, len(fleet.workers))
        stage.finish()
    stage.check(golden)


def hears(stage: Stage, workers: int) -> None:
    """Every worker answers a ping through the broker."""

    def answers() -> bool:
        with closing(Queue(stage.settings)) as queue:
            try:
                return len(queue.app.control.ping(timeout=1)) >= workers
            except Exception as error:  # whatever the client raises while Redis comes back
                print(f"no ping yet: {type(error).__name__}")
                return False

    stage.wait(answers, "answer to a ping")
