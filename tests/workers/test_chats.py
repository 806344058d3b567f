"""Somebody sits in front of a chat: it is seated before bulk, and told of before bulk.

Over a runner without a model, on both databases; whole bodies against a model's files.
"""

import random
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator import lifecycle
from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.errors import ParameterError
from orchestrator.settings import Settings
from orchestrator.spec.bodies import plan_bodies
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.fake_runner import FakeRunner
from tests.orchestrator.db.builders import claim_some, rows, small_plan
from tests.workers.test_engine import ENDLESS, EOS
from tests.workers.test_engine_thread import at_work, nothing, wait
from workers import engine_thread
from workers.admission import to_completion
from workers.door import check_plan
from workers.drawing.sampler import Sampling
from workers.engine.engine import Choice, Completion, Engine, Finished, Started, Tokens
from workers.engine.seats import Admitted
from workers.engine.waiting import Waiting
from workers.folders.folder import TINY, ModelFolder
from workers.loading.model import LoadedModel
from workers.loading.wording import Wording
from workers.recorder import Recorder
from workers.words.tokenizer import Tokenizer

# Whatever happens within a minute happens neither for a flush of all nor for a look at the clock.
PATIENT = Settings(threads=1, flush_seconds=60, poll_seconds=60, lease_seconds=600)
BULK = """
name: bulk
model: tiny
dataset: {items: [{word: garden}, {word: window}]}
params: {messages: [{role: user, content: "{{ word }}"}]}
sweep: {max_tokens: [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]}
"""
CHUNKS = "SELECT request_id, sum(n_tokens) FROM chunks GROUP BY request_id"


@pytest.fixture(autouse=True)
def _unsought(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flush of all because it is time to ask for suspects."""
    monkeypatch.setattr(engine_thread, "_SUSPECTS_INTERVAL_SECONDS", 3600)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return LoadedModel.load(ModelFolder.load(TINY), PATIENT, slots=1)


@pytest.fixture(scope="module")
def wording() -> Wording:
    return Wording.load(TINY)


def body(text: str = "chatting", **more: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "seed": 7, **more}


def submit_chat(db: Database, **more: object) -> str:
    made = plan_bodies("chat", "tiny", [("chat", body(**more))], priority=1000)
    return store.insert_job(db, made, store.Origin(kind="chat"))


def submit_bulk(db: Database) -> str:
    return store.insert_job(db, plan(parse_job(BULK, file="bulk.yaml", root=Path())))


def request_of(db: Database, job_id: str) -> int:
    found: int = rows(db, f"SELECT id FROM requests WHERE job_id = '{job_id}'")[0][0]
    return found


def text_of(db: Database, job_id: str) -> str | None:
    (result,) = views.results(db, job_id)
    return result.choices[0].text


class Gate:
    """Holds the engine in its step number `at` until it is opened."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0
        self.held, self.open = threading.Event(), threading.Event()

    def __call__(self, _rows: Sequence[bytes]) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.held.set()
            assert self.open.wait(60)


def test_the_first_tokens_of_a_chat_are_stored_at_once_and_bulk_waits(
    db: Database, tiny: LoadedModel
) -> None:
    gate = Gate(3)
    submit_bulk(db)
    chat = submit_chat(db, max_tokens=20)
    with at_work(db, tiny, gate, settings=PATIENT):
        assert gate.held.wait(60)
        stored = dict(rows(db, CHUNKS))
        assert list(stored) == [request_of(db, chat)], "bulk is flushed with it, or nothing is"
        assert stored[request_of(db, chat)] > 0
        assert views.job_status(db, chat).state == "running"
        gate.open.set()
        wait(lambda: views.job_status(db, chat).state == "succeeded")


def test_a_chat_that_is_cancelled_leaves_before_the_next_flush_of_all(
    db: Database, tiny: LoadedModel
) -> None:
    gate = Gate(3)
    settings = replace(PATIENT, chat_flush_seconds=0.001)
    chat = submit_chat(db, max_tokens=200)
    with at_work(db, tiny, gate, settings=settings):
        assert gate.held.wait(60)
        lifecycle.cancel(db, chat)
        gate.open.set()
        wait(lambda: views.job_status(db, chat).state == "cancelled")
    assert gate.steps < 199


def test_a_chat_takes_the_next_free_slot_before_the_bulk_that_was_claimed(
    db: Database, tiny: LoadedModel
) -> None:
    """Twelve are claimed, eight of them seated; the first of these ends after fourteen tokens."""
    seen: list[list[bytes]] = []
    chats: list[str] = []
    workers: list[Any] = []

    def watch(texts: Sequence[bytes]) -> None:
        seen.append(list(texts))
        if len(seen) == 5:
            chats.append(submit_chat(db, max_tokens=30))
            wait(lambda: workers)
            workers[0].nudge()

    submit_bulk(db)
    with at_work(db, tiny, watch, settings=PATIENT) as thread:
        workers.append(thread)
        wait(lambda: chats and views.job_status(db, chats[0]).state == "succeeded")
    first = next(i for i, texts in enumerate(seen) if any(b"chatting" in t for t in texts))
    for before, after in pairwise(seen[4 : first + 1]):
        bulk = [text for text in after if b"chatting" not in text]
        assert len(before) == len(after) == 8
        assert all(any(t.startswith(old) for old in before) for t in bulk), "bulk was seated first"
    again = submit_chat(db, max_tokens=30)
    with at_work(db, tiny, nothing, settings=PATIENT):
        wait(lambda: views.job_status(db, again).state == "succeeded")
    assert text_of(db, again) == text_of(db, chats[0]), "its neighbours changed it"


def recorded(db: Database, claims: Sequence[store.Claimed], seconds: float) -> Recorder:
    made = Recorder(
        db,
        model="tiny",
        fingerprint="fp_test",
        lease_seconds=60,
        flush_seconds=3600,
        chat_seconds=seconds,
    )
    for claimed in claims:
        made.begin(claimed)
    return made


def said(claimed: store.Claimed, start: int) -> Tokens:
    return Tokens(claimed.request_id, 0, start, (5,), f"{start} ", ())


def test_first_tokens_are_due_now_and_later_ones_after_their_interval(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    submit_chat(db)
    chat, bulk = claim_some(db)
    made = recorded(db, [bulk, chat], 3600)
    made.record([Started(bulk.request_id, 9, 0), said(bulk, 0), Started(chat.request_id, 9, 0)])
    assert not made.chats_due
    made.record([said(chat, 0)])
    assert made.chats_due
    assert not made.due
    assert made.flush_chats() == frozenset()
    assert rows(db, CHUNKS) == [(chat.request_id, 1)]
    made.record([said(chat, 1)])
    assert not made.chats_due
    made._chats_at -= 3600  # its interval has passed
    assert made.chats_due
    made.flush_chats()
    assert rows(db, CHUNKS) == [(chat.request_id, 2)]
    made.flush()
    assert dict(rows(db, CHUNKS)) == {chat.request_id: 2, bulk.request_id: 1}


def test_what_flushes_of_chats_write_is_what_one_flush_would(db: Database) -> None:
    """Any mixture of the two flushes: every token once, in order, and the text whole."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    store.insert_job(db, small_plan(3, (0,)))
    for _ in range(2):
        submit_chat(db)
    claims = claim_some(db)
    made = recorded(db, claims, 0.0)
    made.record([Started(claimed.request_id, 9, 0) for claimed in claims])
    told = dict.fromkeys(range(len(claims)), 0)
    while any(count < 9 for count in told.values()):
        who = draw.choice([i for i, count in told.items() if count < 9])
        made.record([said(claims[who], told[who])])
        told[who] += 1
        if told[who] == 9:
            whole = "".join(f"{i} " for i in range(9))
            made.record([Finished(claims[who].request_id, 0, "length", whole)])
        draw.choice([made.flush, made.flush_chats, lambda: None, lambda: None])()
    made.flush()
    assert not made.open
    assert set(rows(db, "SELECT state FROM requests")) == {("succeeded",)}
    assert {row[1] for row in rows(db, CHUNKS)} == {9}
    for claimed in claims:
        stored = rows(
            db,
            f"SELECT text FROM chunks WHERE request_id = {claimed.request_id} ORDER BY token_start",
        )
        assert "".join(text for (text,) in stored) == "".join(f"{i} " for i in range(9))
    assert {row[0] for row in rows(db, "SELECT completion_tokens FROM usage")} == {9}


def test_a_chat_that_was_lost_to_another_worker_writes_nothing(db: Database) -> None:
    submit_chat(db)
    (chat,) = claim_some(db)
    made = recorded(db, [chat], 0.0)
    store.release(db, [(chat.request_id, chat.epoch)])
    claim_some(db, worker="other")
    made.record([Started(chat.request_id, 9, 0), said(chat, 0)])
    assert made.flush_chats() == {chat.request_id}
    assert rows(db, CHUNKS) == []
    assert not made.holds(chat.request_id)


def completion(id: int, *, urgent: bool = False, prompt: int = 1) -> Completion:
    tokens = tuple(range(11 + id, 11 + id + prompt))  # nobody's prompt begins another's
    sampling = Sampling(seed=id, logit_bias=ENDLESS)
    return Completion(id, tokens, sampling, (Choice(0),), max_tokens=9, urgent=urgent)


def test_the_urgent_wait_before_the_others_in_their_own_order() -> None:
    waiting = Waiting()
    for id, urgent in ((1, False), (2, True), (3, False), (4, True)):
        waiting.add(completion(id, urgent=urgent), 99)
    assert [each.completion.id for each in waiting.all] == [2, 4, 1, 3]
    assert (waiting.urgent, waiting.choices) == (2, 4)


def test_nobody_goes_before_a_prompt_that_lies_in_a_staging_row() -> None:
    """Its row would be given to whoever begins first."""
    waiting = Waiting()
    half = Admitted(completion(1), 9, deque([Choice(0)]), b"", row=8, done=3)
    waiting.all.extend([half])
    waiting.add(completion(2), 99)
    waiting.add(completion(3, urgent=True), 99)
    assert [each.completion.id for each in waiting.all] == [1, 3, 2]


def test_urgent_completions_that_come_in_at_any_time_change_nobodys_tokens() -> None:
    """Prompts of many chunks, computed half while others come: each yields what it yields alone."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    tokenizer = Tokenizer(TINY)

    def engine(slots: int) -> Engine:
        runner = FakeRunner(tokenizer.vocab_size, slots=slots, max_length=300)
        return Engine(runner, tokenizer, EOS, max_stall=1e-9)

    def told(events: Sequence[Any]) -> list[tuple[int, int]]:
        return [(e.id, t) for e in events if isinstance(e, Tokens) for t in e.tokens]

    asked = [
        completion(id, urgent=draw.random() < 0.3, prompt=draw.choice([1, 9, 120, 200]))
        for id in range(40)
    ]
    busy, got = engine(3), dict[int, list[int]]()
    late = list(asked)
    while late or not busy.idle:
        while late and draw.random() < 0.4:
            busy.admit(late.pop())
        for id, token in told(busy.step()):
            got.setdefault(id, []).append(token)
    for each in asked:
        alone, expected = engine(1), []
        alone.admit(each)
        while not alone.idle:
            expected += [token for _, token in told(alone.step())]
        assert got[each.id] == expected


def test_a_body_is_admitted_as_it_was_sent(db: Database, wording: Wording) -> None:
    submit_chat(db, max_tokens=5, n=2, stop="{{ a }}")
    (claimed,) = claim_some(db)
    made = to_completion(claimed, wording)
    assert (made.max_tokens, len(made.choices), made.stops, made.urgent) == (
        5,
        2,
        ("{{ a }}",),
        True,
    )


def test_each_body_is_checked_by_itself_and_named(wording: Wording) -> None:
    def check(*bodies: dict[str, object], context: int = 100) -> None:
        lines = [(f"line-{i}", each) for i, each in enumerate(bodies)]
        check_plan(plan_bodies("b", "tiny", lines, source="file-x"), wording, context=context)

    def refused(wrong: dict[str, object], context: int = 100) -> ParameterError:
        with pytest.raises(ParameterError) as error:
            check(body("{{ a }} {% x"), wrong, body(), context=context)
        assert str(error.value).startswith("file-x: item 1 (custom_id 'line-1'): ")
        return error.value

    vocab = wording.tokenizer.vocab_size
    check(body("{{ a }} {% x"), body(max_tokens=50), body(logit_bias={str(vocab - 1): 1}))
    assert refused(body(max_tokens=99)).code == "context_length_exceeded"
    assert refused(body("long " * 200)).param == "messages"
    assert refused(body(logit_bias={str(vocab): 1})).param == "logit_bias"
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y"}}}
    shape = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": schema}}
    closed = schema | {"required": ["a"], "additionalProperties": False}
    shape["json_schema"] = {"name": "s", "strict": True, "schema": closed}
    assert refused(body(response_format=shape)).param == "response_format"
