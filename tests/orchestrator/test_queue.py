"""The broker as it behaves when it is away, frozen, full, or set up to lose keys: a real Redis."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from orchestrator import metrics
from orchestrator.errors import WorkerError
from orchestrator.queue import WAKE, Queue
from orchestrator.settings import Settings
from tests.redis_server import RedisServer

MOST_SECONDS = 8.0
"""Generous: 2 s of patience, and a machine that has other things to do. It is measured at 2.01."""


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def queue_to(server: RedisServer) -> "closing[Queue]":
    return closing(Queue(Settings(broker_url=server.url)))


def timed_wake(queue: Queue, what: str) -> bool:
    began = time.monotonic()
    sent = queue.wake("tiny")
    took = time.monotonic() - began
    print(f"publishing, broker {what}: {took:.3f} s, sent: {sent}")
    assert took < MOST_SECONDS, what
    return sent


def test_publishing_neither_fails_nor_holds_whoever_publishes(redis_server: RedisServer) -> None:
    lost = metrics.NUDGES_LOST.labels(WAKE)._value.get()
    with queue_to(redis_server) as warm, queue_to(redis_server) as cold:
        assert timed_wake(warm, "up")
        redis_server.freeze()
        try:
            assert not timed_wake(warm, "frozen, connected before")
            assert not timed_wake(cold, "frozen")
        finally:
            redis_server.thaw()
        assert timed_wake(warm, "thawed")
        redis_server.stop()
        assert not timed_wake(warm, "down, connected before")
        assert not timed_wake(cold, "down")
        redis_server.start()
        assert timed_wake(warm, "back")
        redis_server.command("CONFIG", "SET", "maxmemory", "1kb")
        assert not timed_wake(warm, "out of memory")
        redis_server.command("CONFIG", "SET", "maxmemory", "0")
        assert timed_wake(warm, "in order again")
    assert metrics.NUDGES_LOST.labels(WAKE)._value.get() == lost + 5


def test_a_redis_that_may_drop_keys_is_refused_with_the_line_to_change() -> None:
    with (
        RedisServer(maxmemory="50mb", maxmemory_policy="allkeys-lru") as server,
        queue_to(server) as queue,
    ):
        with pytest.raises(WorkerError, match="maxmemory-policy noeviction") as caught:
            queue.check_broker()
        assert "allkeys-lru" in str(caught.value) and caught.value.code == "broker"
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        queue.check_broker()
        # Without a bound nothing is ever evicted, whatever the policy says.
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        server.command("CONFIG", "SET", "maxmemory", "0")
        queue.check_broker()


def test_a_broker_that_cannot_be_asked_is_let_pass_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with RedisServer() as server, queue_to(server) as queue:
        server.command("ACL", "SETUSER", "default", "-config")
        queue.check_broker()
        assert caplog.messages == ["broker.unchecked error=NoPermissionError"]
        caplog.clear()
        server.stop()
        queue.check_broker()
        assert caplog.messages == ["broker.unchecked error=ConnectionError"]
    with closing(Queue(Settings())) as embedded:
        embedded.check_broker()
