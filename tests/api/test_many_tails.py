"""Two hundred streams at once on running requests, many of them dropped: nothing is left behind.

Real server, real worker on `tiny`, on both databases. The random choices of the clients come from
a seed that is printed; TAILS_SEED=N repeats them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from orchestrator import follow, lifecycle
from orchestrator.db.database import Database
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.api.chatting import Json, endless, slowed, tiny, until
from tests.api.conftest import Api, api_at, settings_in
from tests.orchestrator.db.builders import rows
from workers.process import LoadedModel, local_worker

SEED = int(os.environ.get("TAILS_SEED", random.SystemRandom().randrange(2**31)))
TAILS, CHATS, REQUESTS = 188, 12, 4
TOKENS = 160
_GROWTH_BYTES = 40 * 2**20


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny(slots=8)


@pytest.fixture
def service(
    empty_url: str, model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Api]:
    settings = settings_in(tmp_path)
    with (
        Database.open(empty_url) as db,
        api_at(db, settings) as api,
        monkeypatch.context() as patch,
    ):
        slowed(model, 0.01, patch)
        with local_worker(settings, db, api.queue, model):
            yield api


@dataclass
class Seen:
    """What one client got: the data lines of whole events, and whether it read to the end."""

    request_id: int
    data: list[bytes]
    finished: bool = False


def submit(service: Api) -> list[int]:
    """Several long requests; their ids."""
    params = endless(max_tokens=TOKENS)
    params.pop("model")
    text = json.dumps(
        {
            "name": "long",
            "model": "tiny",
            "dataset": {"items": [{"a": a} for a in range(REQUESTS)]},
            "params": params,
        }
    )
    made = plan(parse_job(text, file="long.json", root=Path()))
    job_id = lifecycle.submit(service.db, made, service.queue)
    ids = rows(service.db, f"SELECT id FROM requests WHERE job_id = '{job_id}' ORDER BY id")
    return [row[0] for row in ids]


async def tail(client: httpx.AsyncClient, request_id: int, source: random.Random) -> Seen:
    """Read on to the end; some drop the connection on the way, some of these come back."""
    seen = Seen(request_id, [])
    drop_after = source.choice([None, None, source.randrange(40), source.randrange(40)])
    comes_back = source.random() < 0.5
    last = await read(client, seen, None, drop_after)
    if not seen.finished and comes_back:
        await asyncio.sleep(source.random())
        await read(client, seen, last, None)
    return seen


async def read(
    client: httpx.AsyncClient, seen: Seen, last: str | None, drop_after: int | None
) -> str | None:
    """Events from the one behind `last` on; the id of the last whole one."""
    headers = {} if last is None else {"last-event-id": last}
    path = f"/api/requests/{seen.request_id}/stream"
    async with client.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200
        left, count = b"", 0
        async for piece in answer.aiter_raw():
            *whole, left = (left + piece).split(b"\n\n")
            for event in whole:
                lines = event.split(b"\n")
                seen.data += [each for each in lines if each.startswith(b"data: ")]
                ids = [each[4:].decode() for each in lines if each.startswith(b"id: ")]
                last = ids[-1] if ids else last
                count += 1
                if count == drop_after:
                    return last
    seen.finished = seen.data[-1:] == [b"data: [DONE]"]
    assert seen.finished and not left
    return last


async def chat(client: httpx.AsyncClient, source: random.Random) -> list[bytes]:
    """A streamed chat's data lines; empty where it was dropped on the way."""
    drop_after = source.choice([None, source.randrange(1, 20)])
    body = endless(stream=True, max_tokens=40, seed=source.randrange(1000))
    told: list[bytes] = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                told.append(line.encode())
            if len(told) == drop_after:
                return []
    return told


async def crowd(
    service: Api, ids: list[int], source: random.Random
) -> tuple[list[Seen], list[list[bytes]]]:
    """All of them at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=limits) as client:
        sources = [random.Random(source.random()) for _ in range(TAILS + CHATS)]
        tails = asyncio.gather(
            *(tail(client, ids[i % len(ids)], each) for i, each in enumerate(sources[:TAILS]))
        )
        chats = asyncio.gather(*(chat(client, each) for each in sources[TAILS:]))
        return await tails, await chats


def replayed(service: Api, request_id: int) -> list[bytes]:
    """The data lines of a tail that begins when all is over."""
    answer = httpx.get(f"{service.url}/api/requests/{request_id}/stream", timeout=60)
    return [line for line in answer.content.split(b"\n") if line.startswith(b"data: ")]


def told_as(objects: list[Json]) -> list[object]:
    return [*objects, "[DONE]"]


def parsed(data: list[bytes]) -> list[object]:
    texts = [line.removeprefix(b"data: ").decode() for line in data]
    return [each if each == "[DONE]" else json.loads(each) for each in texts]


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    sockets: int
    files: int
    threads: tuple[str, ...]
    bytes: int


def held(service: Api) -> Held:
    """Once all that was in flight has ended."""
    context = service.app.state.context
    until(lambda: context.tails.followed == 0)
    until(lambda: service.app.state.streams.open == 0)
    until(lambda: service.db.engine.pool.checkedout() == 0)  # type: ignore[attr-defined]
    process = psutil.Process()
    port = int(service.url.rsplit(":", 1)[1])

    def open_here() -> int:
        return sum(
            each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED
            for each in process.net_connections("tcp")
        )

    until(lambda: open_here() == 0)
    # The server's pool of threads comes and goes by itself, and so do those who look for tails.
    passing = ("AnyIO", "asyncio_", "tails", "job-versions", "ThreadPool")
    names = tuple(sorted(t.name for t in threading.enumerate() if not t.name.startswith(passing)))
    return Held(open_here(), process.num_fds(), names, process.memory_info().rss)


def test_two_hundred_tails_leave_nothing_behind(service: Api) -> None:
    print("seed", SEED)
    source = random.Random(SEED)
    after: list[Held] = []
    for _ in range(2):
        ids = submit(service)
        seen, chats = asyncio.run(crowd(service, ids, source))
        check(service, seen, chats)
        after.append(held(service))
    first, last = after
    assert last.sockets == 0
    assert last.files <= first.files + 8
    assert last.threads == first.threads
    assert last.bytes <= first.bytes + _GROWTH_BYTES
    if service.db.dialect == "postgresql":
        idle = "SELECT 1 FROM pg_stat_activity WHERE starts_with(state, 'idle in transaction')"
        until(lambda: not rows(service.db, idle))


def check(service: Api, seen: list[Seen], chats: list[list[bytes]]) -> None:
    """Every tail that was read to its end is the replay; the others are its beginning."""
    assert sum(each.finished for each in seen) >= TAILS // 4
    assert sum(not each.finished for each in seen) >= TAILS // 10
    whole = {id: replayed(service, id) for id in {each.request_id for each in seen}}
    for id, data in whole.items():
        assert parsed(data) == told_as(list(follow.request_chunks(service.db, id)))
        assert len(data) > 3
    for each in seen:
        expected = whole[each.request_id]
        assert each.data == (expected if each.finished else expected[: len(each.data)])
    for told in filter(None, chats):
        handle = parsed(told)[0]["id"]  # type: ignore[index]
        query = (
            f"SELECT r.id FROM requests r JOIN jobs j ON j.id = r.job_id WHERE handle = '{handle}'"
        )
        ((id,),) = rows(service.db, query)
        assert parsed(told) == told_as(list(follow.request_chunks(service.db, id)))
    open_chats = (
        "SELECT count(*) FROM requests r JOIN jobs j ON j.id = r.job_id"
        " WHERE j.kind = 'chat' AND r.state IN ('queued', 'running')"
    )
    until(lambda: rows(service.db, open_chats) == [(0,)])
