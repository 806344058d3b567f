"""How much may be asked: bytes, seconds, streams, requests a minute, choices."""

import asyncio
import gzip
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from fastapi.responses import StreamingResponse

from orchestrator import allowance
from orchestrator.api import limits
from orchestrator.api.limits import Rates, check_streams
from orchestrator.errors import SpecError
from orchestrator.settings import Settings
from orchestrator.spec.bodies import plan_bodies
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import Plan, plan
from tests.api.conftest import Api

MIB = 1024 * 1024
Changed = Callable[..., AbstractContextManager[Api]]


@pytest.fixture
def small(changed_api: Changed) -> Iterator[Api]:
    """A server that takes 1 MiB, uploads of 2 MiB, and tells how long a body was."""
    with changed_api(max_body_mib=1, max_upload_mib=2) as api:

        async def measure(request: Request) -> dict[str, int]:
            return {"bytes": len(await request.body())}

        api.app.add_api_route("/api/measure", measure, methods=["POST"])
        yield api


def pieces(size: int) -> Iterator[bytes]:
    for start in range(0, size, 65536):
        yield bytes(min(65536, size - start))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_up_to_the_limit_is_taken_and_no_byte_more(small: Api, chunked: bool) -> None:
    def post(size: int) -> httpx.Response:
        content: Any = pieces(size) if chunked else bytes(size)
        return small.http.post("/api/measure", content=content)

    assert post(MIB).json() == {"bytes": MIB}
    answer = post(MIB + 1)
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert error["message"] == "The body is larger than 1 MiB."
    assert error["code"] == "body_too_large"
    assert small.http.get("/api/health").status_code == 200


@pytest.mark.parametrize(
    ("encoding", "status"), [("gzip", 415), ("br, gzip", 415), ("identity", 200)]
)
def test_a_packed_body_is_refused(small: Api, encoding: str, status: int) -> None:
    headers = {"content-encoding": encoding}
    answer = small.http.post("/api/measure", content=gzip.compress(b"a"), headers=headers)
    assert answer.status_code == status


def test_a_length_that_is_told_is_refused_before_a_byte_is_read(small: Api) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        head = f"POST /api/measure HTTP/1.1\r\nHost: {host}\r\nContent-Length: {2 * MIB}\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(12) == b"HTTP/1.1 413"


def test_an_upload_has_a_limit_of_its_own(small: Api) -> None:
    def post(size: int) -> httpx.Response:
        files = {"file": ("lines.jsonl", bytes(size))}
        return small.http.post("/v1/files", files=files, data={"purpose": "batch"})

    assert post(MIB + MIB // 2).status_code != 413
    assert post(2 * MIB + 128 * 1024).status_code == 413


def test_a_body_that_does_not_come_is_given_up(small: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(
            f"POST /api/measure HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\n\r\nabc".encode()
        )
        assert raw.recv(12) == b"HTTP/1.1 408"


def test_one_stream_too_many_is_refused_and_a_place_is_free_again(changed_api: Changed) -> None:
    reading: list[Iterator[bytes]] = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b": here\n\n"
            await asyncio.sleep(0.01)

    async def follow() -> StreamingResponse:
        return StreamingResponse(endless(), media_type="text/event-stream")

    async def early(request: Request) -> None:
        check_streams(request)

    with changed_api(max_streams=2) as api, ExitStack() as streams:
        api.app.add_api_route("/api/follow", follow)
        api.app.add_api_route("/api/early", early)
        for _ in range(2):
            answer = streams.enter_context(api.http.stream("GET", "/api/follow"))
            reading.append(answer.iter_raw())  # dropped, it would close the connection
            assert answer.status_code == 200 and next(reading[-1])
        for path in ("/api/follow", "/api/early"):
            refused = api.http.get(path)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_streams"
            assert int(refused.headers["retry-after"]) > 0
        assert api.http.get("/api/health").status_code == 200
        streams.close()
        while api.app.state.streams.open:
            api.http.get("/api/health")
        with api.http.stream("GET", "/api/follow") as again:
            assert again.status_code == 200


def test_requests_a_minute_are_counted_for_each_key(changed_api: Changed) -> None:
    with changed_api(keys_needed=True, rate_per_minute=3) as api:
        alice, bob = api.bearer("alice", "read"), api.bearer("bob", "read")
        left = []
        for _ in range(3):
            answer = api.http.get("/api/jobs", headers=alice)
            assert answer.status_code == 200
            left.append(answer.headers["x-ratelimit-remaining-requests"])
        assert left == ["2", "1", "0"]
        refused = api.http.get("/api/jobs", headers=alice)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "requests"
        assert refused.headers["retry-after"] == "20"
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        assert api.http.get("/api/jobs", headers=bob).status_code == 200
        statuses = [api.http.get("/api/jobs").status_code for _ in range(4)]
        assert statuses == [401, 401, 401, 429]


def test_a_bucket_never_gives_more_than_a_minutes_worth() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, now = random.Random(seed), 0.0
    rates = Rates(30, now=lambda: now)
    taken: list[float] = []
    asked = 0
    for _ in range(30):  # a rest, and then a burst of more than the bucket holds
        now += chance.uniform(0, 600)
        for _ in range(chance.randrange(1, 200)):
            now += chance.expovariate(10)
            asked += 1
            if rates.take("a")[0]:
                taken.append(now)
    for start in taken:
        assert sum(start <= each < start + 60 for each in taken) <= 30 + 30 + 1
    assert 30 < len(taken) < asked


def test_callers_who_are_full_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MOST_CALLERS", 10)
    now = 0.0
    rates = Rates(60, now=lambda: now)
    for caller in range(1000):
        now += 10.0
        rates.take(str(caller))
    assert len(rates._left) <= 11


def _job(n: str, sweep: str = "", max_tokens: str = "") -> Plan:
    text = (
        "name: a\nmodel: tiny\ndataset: {items: [{q: hi}, {q: ho}]}\n"
        f"params: {{messages: [{{role: user, content: hi}}], n: {n}{max_tokens}}}\n{sweep}"
    )
    return plan(parse_job(text, file="job.yaml", root=Path.cwd()))


def _bodies(*bodies: dict[str, object]) -> Plan:
    return plan_bodies("chat", "tiny", [(str(at), body) for at, body in enumerate(bodies)])


@pytest.mark.parametrize(
    ("fits", "beyond", "settings", "said"),
    [
        (_job("4"), _job("5"), Settings(max_choices=4), "'n'.* <= 4, but got 5"),
        (
            _job("1", "sweep: {n: [2, 4]}\n"),
            _job("1", "sweep: {n: [2, 5]}\n"),
            Settings(max_choices=4),
            "'n'.* <= 4, but got 5",
        ),
        (
            _job("1", "sweep: {seed: [1, 2]}\n"),
            _job("1", "sweep: {seed: [1, 2, 3]}\n"),
            Settings(max_requests=4),
            "at most 4 requests, got 6",
        ),
        (_bodies({}, {}), _bodies({}, {}, {}), Settings(max_requests=2), "at most 2.*got 3"),
        (
            _job("2", max_tokens=", max_tokens: 5"),
            _job("2", max_tokens=", max_tokens: 6"),
            Settings(max_total_tokens=20),
            "at most 20 completion tokens.* up to 24 in 4 completions",
        ),
        (
            _job("1"),
            _job("2"),
            Settings(max_total_tokens=200, max_context=100),
            "up to 400 in 4 .* counts as 100",
        ),
        (
            _bodies({"max_tokens": 9}, {"max_tokens": 11}),
            _bodies({"max_tokens": 9}, {"max_tokens": 6, "n": 2}),
            Settings(max_total_tokens=20),
            "up to 21 in 3 completions",
        ),
    ],
)
def test_what_asks_for_more_than_the_settings_let_in_is_refused(
    fits: Plan, beyond: Plan, settings: Settings, said: str
) -> None:
    allowance.check(fits, settings)
    with pytest.raises(SpecError, match=said):
        allowance.check(beyond, settings)
