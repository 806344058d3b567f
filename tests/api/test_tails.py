"""Requests followed by many at once: each reads what a replay tells, and nothing stays behind."""

import asyncio
import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event

from orchestrator.api import tails
from orchestrator.api.tails import Tails
from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.replay import News, envelope
from orchestrator.db.tailing import Place, look
from orchestrator.errors import NotFound
from orchestrator.follow import ENDED, request_chunks
from orchestrator.spec.chunks import Json, Telling, stream
from tests.orchestrator.db.builders import claim_some, run, small_plan, write
from tests.orchestrator.test_follow_live import Writer

SEED = int(os.environ.get("TAILS_SEED", random.SystemRandom().randrange(2**31)))


class Reader:
    """One who reads a request look by look, and tells it as a stream would."""

    def __init__(self, db: Database, request_id: int) -> None:
        self.place, self.told = Place(request_id, {}), list[Json]()
        self._db, self._telling = db, None

    def read(self, news: News) -> None:
        self.place = self.place.after(news)
        over = news.state in ENDED
        if self._telling is None and (news.chunks or over):
            self._telling: Telling | None = Telling(envelope(self._db, self.place.request_id))
        if (telling := self._telling) is None:
            return
        for chunk in news.chunks:
            self.told += telling.chunk(chunk)
        if over:
            self.told += telling.rest()
            for end in news.ends:
                self.told += telling.end(end)
            self.told += stream(telling.envelope, (), (), news.usage)


def test_every_reader_reads_what_is_replayed(db: Database) -> None:
    print(f"TAILS_SEED={SEED}")
    for seed in range(SEED, SEED + 8):
        dice = random.Random(seed)
        writers = [Writer(db, seed + 1000 * i) for i in range(3)]
        readers = [Reader(db, dice.choice(writers).request_id) for _ in range(7)]
        while any(reader.place.state not in ENDED for reader in readers):
            for writer in writers:
                writer.sleep(0)
            some = [r for r in readers if r.place.state not in ENDED and dice.random() < 0.5]
            for reader, news in zip(some, look(db, [r.place for r in some]), strict=True):
                if news is not None:
                    assert isinstance(news, News)
                    reader.read(news)
        for reader in readers:
            replayed = [json.dumps(each) for each in request_chunks(db, reader.place.request_id)]
            assert [json.dumps(each) for each in reader.told] == replayed


def test_a_look_that_brings_nothing_is_no_news(db: Database) -> None:
    store.insert_job(db, small_plan())
    claims = claim_some(db)
    places = [Place(claimed.request_id, {}) for claimed in claims]
    first = look(db, places)
    assert all(isinstance(news, News) for news in first)
    places = [p.after(n) for p, n in zip(places, first, strict=True) if isinstance(n, News)]
    assert look(db, places) == [None] * len(claims)
    store.flush(db, [write(claims[1], 0, (1, 2), "ab")], lease_seconds=60)
    found = look(db, places)
    assert [news is None for news in found] == [True, False, True, True]
    assert isinstance(found[1], News) and [chunk.text for chunk in found[1].chunks] == ["ab"]


def test_a_look_is_a_query_a_table_however_many_read(db: Database) -> None:
    store.insert_job(db, small_plan(30, (0, 1)))
    claims = claim_some(db)
    for claimed in claims:
        store.flush(db, [write(claimed, 0, (1,), "a")], lease_seconds=60)
    places = [Place(claimed.request_id, {}) for claimed in claims for _ in range(3)]
    with counted(db) as statements:
        found = look(db, places)
    assert len(found) == 180 and all(isinstance(news, News) and news.chunks for news in found)
    selects = [each for each in statements if not each.startswith("BEGIN")]
    assert len(selects) == 4


def test_an_end_without_tokens_is_news(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,), n=2))
    (claimed,) = claim_some(db)
    store.flush(db, [write(claimed, 0, (1,), "a")], lease_seconds=60)
    (news,) = look(db, [Place(claimed.request_id, {})])
    assert isinstance(news, News)
    store.flush(db, [write(claimed, 1, text="!", end="stop", whole="a!")], lease_seconds=60)
    (later,) = look(db, [Place(claimed.request_id, {}).after(news)])
    assert isinstance(later, News) and [end.choice for end in later.ends] == [0]
    assert [chunk.text for chunk in later.chunks] == ["!"]


def test_what_was_seen_elsewhere_is_not_told_again(sqlite_db: Database) -> None:
    store.insert_job(sqlite_db, small_plan(1, (0,)))
    (claimed,) = claim_some(sqlite_db)
    store.flush(sqlite_db, [write(claimed, 0, (1, 2), "ab")], lease_seconds=60)
    store.flush(sqlite_db, [write(claimed, 2, (3,), "c")], lease_seconds=60)
    (news,) = look(sqlite_db, [Place(claimed.request_id, {0: 0})])
    assert isinstance(news, News) and [chunk.text for chunk in news.chunks] == ["c"]


def test_followers_come_and_go_and_leave_nothing(db: Database) -> None:
    print(f"TAILS_SEED={SEED}")
    writer, dice = Writer(db, SEED), random.Random(SEED)
    with closing_tails(db) as all_tails:
        told = asyncio.run(_followed(db, all_tails, writer, dice))
        assert all_tails.followed == 0
    replayed = [json.dumps(each) for each in request_chunks(db, writer.request_id)]
    assert len(told) > 3
    assert all(each == replayed for each in told)
    if db.dialect == "postgresql":
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def _followed(
    db: Database, all_tails: Tails, writer: Writer, dice: random.Random
) -> list[list[str]]:
    """What each follower was told that did not leave before."""

    async def follow(leaves: bool) -> list[str] | None:
        await asyncio.sleep(dice.random() * 0.2)
        reader = Reader(db, writer.request_id)
        looks = all_tails.follow(writer.request_id)
        async for news in looks:
            reader.read(news)
            if leaves and dice.random() < 0.3:
                await looks.aclose()
                return None
        return [json.dumps(each) for each in reader.told]

    def write_all() -> None:
        while not writer.over:
            writer.sleep(0)

    followers = [asyncio.create_task(follow(i % 3 == 0)) for i in range(30)]
    await asyncio.to_thread(write_all)
    cut = [followers[i] for i in range(0, 30, 7)]
    for follower in cut:
        follower.cancel()
    found = await asyncio.gather(*followers, return_exceptions=True)
    assert not [e for e in found if isinstance(e, Exception)]
    return [each for each in found if isinstance(each, list)]


def test_a_request_that_is_not_there_is_not_found(sqlite_db: Database) -> None:
    store.insert_job(sqlite_db, small_plan(1, (0,)))
    (claimed,) = claim_some(sqlite_db)

    async def removed() -> None:
        async for _ in all_tails.follow(claimed.request_id):
            run(sqlite_db, "DELETE FROM jobs")

    async def missing() -> None:
        await anext(all_tails.follow(5))

    with closing_tails(sqlite_db) as all_tails:
        for wrong in (missing, removed):
            with pytest.raises(NotFound):
                asyncio.run(wrong())


def test_closing_ends_the_followers(sqlite_db: Database) -> None:
    job_id = store.insert_job(sqlite_db, small_plan(1, (0,)))
    (claimed,) = claim_some(sqlite_db)
    version = views.version(sqlite_db, job_id)

    async def follow() -> list[str]:
        states = []
        async for news in all_tails.follow(claimed.request_id):
            states.append(news.state)
            asyncio.get_running_loop().run_in_executor(None, all_tails.close)
        assert await all_tails.changed(job_id, version, 60) == version
        return states

    with closing_tails(sqlite_db) as all_tails:
        assert asyncio.run(follow()) == ["running"]


def test_a_version_is_waited_for(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "JOB_LOOK_SECONDS", 0.01)
    job_id = store.insert_job(db, small_plan(1, (0,)))
    before = views.version(db, job_id)

    async def wait() -> str:
        waiting = asyncio.create_task(all_tails.changed(job_id, before, 60))
        assert await all_tails.changed(job_id, before, 0.05) == before
        await asyncio.to_thread(claim_some, db)
        return await waiting

    with closing_tails(db) as all_tails:
        after = asyncio.run(wait())
        assert after == views.version(db, job_id) != before
        with pytest.raises(NotFound):
            asyncio.run(all_tails.changed("job_none", before, 60))


@contextmanager
def closing_tails(db: Database) -> Iterator[Tails]:
    opened = Tails(db)
    try:
        yield opened
    finally:
        opened.close()
        left = {"tails", "job-versions"} & {each.name for each in threading.enumerate()}
        assert not left


@contextmanager
def counted(db: Database) -> Iterator[list[str]]:
    statements: list[str] = []

    def seen(_c: object, _k: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(db.engine, "before_cursor_execute", seen)
    try:
        yield statements
    finally:
        event.remove(db.engine, "before_cursor_execute", seen)
