"""Jobs whose lines are whole bodies: taken word for word, submitted once, on both databases."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from orchestrator import export, lifecycle
from orchestrator.db import plans, replay, store, views
from orchestrator.db.database import Database
from orchestrator.errors import Conflict, ParameterError, SpecError
from orchestrator.queue import WAKE, Queue, model_queue
from orchestrator.spec.bodies import BodiesPlan, Line, plan_bodies
from orchestrator.spec.chunks import completion_id
from orchestrator.spec.plan import resolve
from tests.nudges import embedded_queue, taken
from tests.orchestrator.db.builders import claim_some, rows, run, small_plan, write

TINY = model_queue("tiny")


def body(text: str = "{{ a }} and {% raw", **more: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def chat(text: str = "{{ a }} and {% raw", **more: object) -> BodiesPlan:
    return plan_bodies("chat", "tiny", [("chat", body(text, **more))])


@pytest.fixture
def queue() -> Iterator[Queue]:
    made = embedded_queue(TINY)
    yield made
    made.close()


def test_a_body_is_taken_word_for_word() -> None:
    params = resolve({}, {}, body(stop=["{{ b }}"], user="{% x"), 7, verbatim=True)
    assert params.messages[0]["content"] == "{{ a }} and {% raw"
    assert (params.stop, params.user, params.seed) == (("{{ b }}",), "{% x", 7)


def test_what_each_body_says_becomes_its_request() -> None:
    lines = [
        ("one", body(n=2, max_tokens=5, user="ann")),
        ("two", body(seed=-3)),
        ("three", body(max_tokens=7)),
    ]
    made = plan_bodies("batch", "tiny", lines, seed=11)
    asked = list(made.requests())
    assert [(r.position, r.item.custom_id, r.n, r.max_tokens, r.user) for r in asked] == [
        (0, "one", 2, 5, "ann"),
        (1, "two", 1, None, None),
        (2, "three", 1, 7, None),
    ]
    assert (made.n_requests, made.n_choices, made.max_total_tokens) == (3, 4, None)
    assert plan_bodies("batch", "tiny", [lines[0], lines[2]]).max_total_tokens == 17
    assert asked[1].seed == -3
    assert len({r.seed for r in asked}) == 3
    assert [r.seed for r in made.requests()] == [r.seed for r in asked]
    others = [r.seed for r in plan_bodies("batch", "tiny", lines, seed=12).requests()]
    assert [a == r.seed for a, r in zip(others, asked, strict=True)] == [False, True, False]


def test_the_digest_tells_the_same_lines_again_and_no_others() -> None:
    lines = [("a", body()), ("b", body("other"))]
    digest = plan_bodies("batch", "tiny", lines).spec.digest
    assert plan_bodies("batch", "tiny", lambda: iter(lines)).spec.digest == digest
    changed = (
        lines[::-1],
        lines[:1],
        [("a", body()), ("c", body("other"))],
        [("a", body(n=2)), lines[1]],
        [("a", body()), ("b", {"messages": body("other")["messages"], "model": "tiny"})],
    )
    for other in changed:
        assert plan_bodies("batch", "tiny", other).spec.digest != digest


def test_lines_are_read_anew_and_never_held(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps([str(i), body(str(i))]) + "\n" for i in range(50)))
    opened = 0

    def lines() -> Iterator[Line]:
        nonlocal opened
        opened += 1
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                custom_id, read = json.loads(line)
                yield custom_id, read

    made = plan_bodies("batch", "tiny", lines, source="file-x")
    assert (opened, made.n_items, made.spec.dataset.to_json()["path"]) == (1, 50, "file-x")
    assert len(list(made.requests())) == 50
    assert opened == 2
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(["late", body()]) + "\n")
    with pytest.raises(SpecError, match="as they were when counted"):
        list(made.items())


def test_no_line_is_no_plan_and_a_plan_has_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="at least one request"):
        plan_bodies("batch", "tiny", [])
    monkeypatch.setattr("orchestrator.spec.bodies.MAX_REQUESTS", 3)
    monkeypatch.setattr("orchestrator.spec.bodies.MAX_CHOICES", 4)
    assert plan_bodies("batch", "tiny", [(str(i), body()) for i in range(3)]).n_items == 3
    with pytest.raises(SpecError, match="at most 3 requests"):
        plan_bodies("batch", "tiny", [(str(i), body()) for i in range(4)])
    with pytest.raises(SpecError, match="at most 4 completions"):
        plan_bodies("batch", "tiny", [("a", body(n=5))])


def test_a_chat_is_found_by_its_completion_and_claimed_as_it_was_sent(
    db: Database, queue: Queue
) -> None:
    store.insert_job(db, small_plan(1, (0,)))
    asked = body(n=2, max_tokens=5, user="ann", tools=[])
    made = plan_bodies("chat", "tiny", [("chat", asked)], priority=1000)
    hook = {"url": "http://127.0.0.1:9/", "secret": "s"}
    job_id = lifecycle.submit(db, made, queue, owner="ann", kind="chat", webhook=hook)
    assert taken(queue, TINY) == [(WAKE, ["tiny"])]
    (first, *_) = claim_some(db)
    assert (first.job_id, first.kind, first.urgent, first.verbatim) == (job_id, "chat", True, True)
    assert (dict(first.columns), len(first.choices)) == (asked, 2)
    found = rows(db, f"SELECT kind, owner, handle, n_choices FROM jobs WHERE id = '{job_id}'")
    assert found == [("chat", "ann", completion_id(first.request_id, job_id), 2)]
    stored = rows(db, f"SELECT webhook FROM jobs WHERE id = '{job_id}'")[0][0]
    assert (json.loads(stored) if isinstance(stored, str) else stored) == hook
    assert rows(db, "SELECT end_user FROM requests WHERE n = 2") == [("ann",)]


def test_a_handle_that_is_given_stays(db: Database, queue: Queue) -> None:
    lifecycle.submit(db, chat(), queue, kind="chat", handle="chatcmpl-mine")
    assert rows(db, "SELECT handle FROM jobs") == [("chatcmpl-mine",)]


def test_chats_alone_are_claimed_where_others_have_no_room(db: Database) -> None:
    store.insert_job(db, small_plan(3, (0,), priority=5000))
    job_id = store.insert_job(db, chat(), store.Origin(kind="chat"))
    store.insert_job(db, plan_bodies("batch", "tiny", [("a", body())]), store.Origin(kind="batch"))
    how: dict[str, Any] = {"model": "tiny", "worker_id": "w", "limit": 9, "lease_seconds": 60}
    claims = store.claim(db, **how, chats=True)
    assert [claimed.job_id for claimed in claims] == [job_id]
    assert store.claim(db, **how, chats=True) == []
    others = store.claim(db, **how)
    assert [(c.kind, c.urgent) for c in others] == [("job", False)] * 3 + [("batch", False)]


def test_a_kind_has_its_own_sort_of_plan(sqlite_db: Database) -> None:
    for plan, kind in ((chat(), "job"), (small_plan(), "chat"), (small_plan(), "batch")):
        with pytest.raises(ValueError, match="another sort"):
            store.insert_job(sqlite_db, plan, store.Origin(kind=kind))
    assert rows(sqlite_db, "SELECT count(*) FROM jobs") == [(0,)]


def test_replay_and_export_take_the_parameters_of_the_body(db: Database) -> None:
    options = {"include_usage": True}
    functions = [{"name": "f", "parameters": {"type": "object"}}]
    asked = body(logprobs=True, stream_options=options, service_tier="default", functions=functions)
    lines = [("rich", asked), ("plain", body())]
    job_id = store.insert_job(db, plan_bodies("b", "tiny", lines), store.Origin(kind="batch"))
    claims = claim_some(db)
    rich, plain = (replay.envelope(db, claimed.request_id) for claimed in claims)
    assert (rich.logprobs, rich.include_usage, rich.service_tier, rich.calls) == (
        True,
        True,
        "default",
        "function",
    )
    assert (plain.logprobs, plain.include_usage, plain.service_tier, plain.calls) == (
        False,
        False,
        None,
        "tools",
    )
    done = [write(c, 0, (1,), "x", end="stop", whole="x", outcome="succeeded") for c in claims]
    store.flush(db, done, lease_seconds=60)
    out = StringIO()
    export.export(views.results(db, job_id), out, lambda count: None)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["custom_id"], first["item"], first["point"]) == ("rich", asked, {})
    assert first["completion"]["service_tier"] == "default"
    assert "service_tier" not in second["completion"]


def test_the_same_key_and_content_is_the_same_job(db: Database, queue: Queue) -> None:
    def submit(plan: Any, key: str | None, owner: str = "ann") -> str:
        return lifecycle.submit(db, plan, queue, owner=owner, kind="chat", idempotency_key=key)

    first = submit(chat(), "k")
    assert submit(chat(), "k") == first
    assert len(taken(queue, TINY)) == 2  # the first nudge may have been lost
    assert len({first, submit(chat(), "k2"), submit(chat(), "k", "bob"), submit(chat(), None)}) == 4
    with pytest.raises(Conflict, match="other content"):
        submit(chat(n=2), "k")
    assert rows(db, "SELECT count(*) FROM jobs") == [(4,)]
    assert submit(chat(), None) != submit(chat(), None)


@pytest.mark.parametrize("same", [True, False])
def test_of_many_submits_with_one_key_one_wins(db: Database, queue: Queue, same: bool) -> None:
    def submit(position: int) -> str:
        text = "same" if same else str(position)
        try:
            return lifecycle.submit(db, chat(text), queue, kind="chat", idempotency_key="k")
        except Conflict:
            return ""

    with ThreadPoolExecutor(6) as pool:
        ids = list(pool.map(submit, range(6)))
    assert len(set(ids) - {""}) == 1
    assert ids.count("") == (0 if same else 5)
    assert rows(db, "SELECT id FROM jobs") == [(max(ids),)]
    assert len(claim_some(db)) == 1


@pytest.mark.parametrize("batch", [1, 1000])
def test_the_slower_of_two_submits_leaves_no_row(
    db: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Both have found the key free; the other one is whole first."""
    monkeypatch.setattr(plans, "BATCH", batch)
    faster: list[str] = []
    plain = plans.new_job_id

    def overtaken() -> str:
        if not faster:
            faster.append("")
            faster[0] = lifecycle.submit(db, chat(), queue, kind="chat", idempotency_key="k")
        return plain()

    monkeypatch.setattr(plans, "new_job_id", overtaken)
    job_id = lifecycle.submit(db, chat(), queue, kind="chat", idempotency_key="k")
    assert [job_id] == faster
    assert rows(db, "SELECT id FROM jobs") == [(job_id,)]
    assert rows(db, "SELECT count(*) FROM requests") == [(1,)]


def test_a_submitter_killed_half_way_leaves_the_key_free(db: Database, queue: Queue) -> None:
    lifecycle.submit(db, chat(), queue, kind="chat", idempotency_key="k")
    # As it stands when the process dies before its last transaction.
    run(db, "UPDATE jobs SET planned_at = NULL, idempotency_key = NULL")
    job_id = lifecycle.submit(db, chat(), queue, kind="chat", idempotency_key="k")
    assert [claimed.job_id for claimed in claim_some(db)] == [job_id]


def test_any_body_comes_back_from_the_rows_as_it_went_in(db: Database) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    letters = "{}%# \\\"'\n\té😀\0<>&$"

    def text() -> str:
        return "".join(draw.choices(letters, k=draw.randrange(1, 12)))

    lines = [
        (f"{i} {draw.choice('abc')}", body(text(), stop=[text()], temperature=draw.random()))
        for i in range(20)
    ]
    store.insert_job(db, plan_bodies("b", "tiny", lines), store.Origin(kind="batch"))
    claims = claim_some(db)
    assert [dict(claimed.columns) for claimed in claims] == [sent for _, sent in lines]
    for claimed, (_, sent) in zip(claims, lines, strict=True):
        params = resolve(
            claimed.params, claimed.point_params, claimed.columns, 1, verbatim=claimed.verbatim
        )
        assert params.messages[0]["content"] == sent["messages"][0]["content"]  # type: ignore[index]
        assert list(params.stop) == sent["stop"]


def test_a_worker_refuses_a_body_that_was_changed_behind_its_back(db: Database) -> None:
    store.insert_job(db, chat(), store.Origin(kind="chat"))
    (claimed,) = claim_some(db)
    broken = replace(claimed, columns=body(temperature=9))
    with pytest.raises(ParameterError, match="temperature"):
        resolve({}, {}, broken.columns, broken.seed, verbatim=broken.verbatim)
