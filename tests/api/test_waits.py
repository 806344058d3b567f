"""Whoever waits for rows to change is answered once, and nobody is looked for who has left."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from orchestrator.api import waits
from orchestrator.api.waits import Poller, Stopped
from orchestrator.errors import WorkerError

EVERY = 0.005


class Rows:
    """What is looked at: the answer to a question is what was put under it."""

    def __init__(self) -> None:
        self.answers: dict[str, str | Exception] = {}
        self.looks: list[list[str]] = []
        self.away: Exception | None = None

    def look(self, questions: Sequence[str]) -> list[str | Exception | None]:
        self.looks.append(sorted(questions))
        if self.away is not None:
            raise self.away
        return [self.answers.get(question) for question in questions]


@contextmanager
def polling(rows: Rows) -> Iterator[Poller[str, str]]:
    poller: Poller[str, str] = Poller("test-waits", rows.look, EVERY)
    try:
        yield poller
    finally:
        poller.close()
        assert not [each for each in threading.enumerate() if each.name == "test-waits"]


async def until(rows: Rows, looks: int) -> None:
    """So many looks later."""
    there = len(rows.looks) + looks
    while len(rows.looks) < there:
        await asyncio.sleep(EVERY)


def test_one_look_answers_all_who_wait() -> None:
    rows = Rows()

    async def ask_all(poller: Poller[str, str]) -> list[str | None]:
        asked = [asyncio.create_task(poller.ask(f"q{i % 5}")) for i in range(50)]
        await until(rows, 3)
        assert poller.waiting == 50
        rows.answers = {f"q{i}": f"a{i}" for i in range(5)}
        return await asyncio.gather(*asked)

    with polling(rows) as poller:
        assert asyncio.run(ask_all(poller)) == [f"a{i % 5}" for i in range(50)]
        assert poller.waiting == 0
    assert max(map(len, rows.looks)) == 50


def test_nobody_is_looked_for_who_has_left() -> None:
    rows = Rows()

    async def leave(poller: Poller[str, str]) -> None:
        asked = asyncio.create_task(poller.ask("q"))
        await until(rows, 2)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert poller.waiting == 0
        assert await poller.ask("q", 0.05) is None
        assert poller.waiting == 0

    with polling(rows) as poller:
        asyncio.run(leave(poller))
        time.sleep(3 * EVERY)  # a look that had begun is over
        before = len(rows.looks)
        time.sleep(5 * EVERY)
        assert len(rows.looks) == before


def test_the_thread_ends_and_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_IDLE_SECONDS", 0.01)
    rows = Rows()
    rows.answers = {"q": "a"}
    with polling(rows) as poller:
        assert asyncio.run(poller.ask("q")) == "a"
        while [each for each in threading.enumerate() if each.name == "test-waits"]:
            time.sleep(EVERY)
        assert asyncio.run(poller.ask("q")) == "a"


def test_what_a_look_says_is_raised_where_it_was_asked() -> None:
    rows = Rows()
    rows.answers = {"bad": KeyError("bad"), "good": "a"}

    async def both(poller: Poller[str, str]) -> list[object]:
        asked = (poller.ask("bad"), poller.ask("good"))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    with polling(rows) as poller:
        bad, good = asyncio.run(both(poller))
    assert isinstance(bad, KeyError) and good == "a"


def test_a_database_that_is_away_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Rows()
    rows.away = WorkerError("database", "gone")

    async def come_back(poller: Poller[str, str]) -> str | None:
        asked = asyncio.create_task(poller.ask("q"))
        await until(rows, 3)
        rows.answers, rows.away = {"q": "a"}, None
        return await asked

    with polling(rows) as poller:
        assert asyncio.run(come_back(poller)) == "a"
        monkeypatch.setattr(waits, "PATIENCE_SECONDS", 0.0)
        rows.away = WorkerError("database", "gone")
        with pytest.raises(WorkerError, match="gone"):
            asyncio.run(poller.ask("q"))


def test_a_bug_is_told_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows()
    rows.away = ZeroDivisionError()
    with polling(rows) as poller:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(poller.ask("q"))
        rows.answers, rows.away = {"q": "a"}, None
        assert asyncio.run(poller.ask("q")) == "a"
    assert "a look failed" in caplog.text


def test_closing_tells_all_who_wait_and_all_who_come() -> None:
    rows = Rows()

    async def close(poller: Poller[str, str]) -> list[object]:
        asked = [asyncio.create_task(poller.ask(name)) for name in "abc"]
        await until(rows, 1)
        await asyncio.to_thread(poller.close)
        told = await asyncio.gather(*asked, return_exceptions=True)
        with pytest.raises(Stopped):
            await poller.ask("late")
        return list(told)

    with polling(rows) as poller:
        assert all(isinstance(each, Stopped) for each in asyncio.run(close(poller)))
