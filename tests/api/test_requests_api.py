"""One request over HTTP: what it asks, what came of it, and its text as it comes."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from orchestrator import lifecycle
from orchestrator.api import requests as routes
from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.follow import request_chunks
from tests.api.conftest import Api
from tests.orchestrator.db.builders import claim_some, run, small_plan, write
from tests.orchestrator.test_follow_live import Writer


def written(db: Database, seed: int) -> Writer:
    """A request with three choices, wholly written."""
    writer = Writer(db, seed)
    while not writer.over:
        writer.sleep(0)
    return writer


def events(text: str) -> list[tuple[int | None, str]]:
    """Each event's id and data; comments and `retry` left out."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(each.split(": ", 1) for each in block.split("\n") if ": " in each)
        if "data" in lines:
            found.append((int(lines["id"]) if "id" in lines else None, lines["data"]))
    return found


def compact(chunk: dict[str, Any]) -> str:
    return json.dumps(chunk, separators=(",", ":"))


def test_a_request_is_told_with_its_choices(api: Api) -> None:
    plan = small_plan(1, (0.5,), n=2)
    store.insert_job(api.db, plan)
    (claimed,) = claim_some(api.db)
    store.flush(api.db, [write(claimed, 0, (1, 2), "ab")], lease_seconds=60)
    told = api.http.get(f"/api/requests/{claimed.request_id}").json()
    assert told["messages"] == [{"role": "user", "content": "What is 0?"}]
    assert told["params"] == {
        "model": "tiny",
        "max_tokens": 24,
        "n": 2,
        "temperature": 0.5,
        "seed": told["seed"],
    }
    assert [(c["choice"], c["text"], c["n_tokens"]) for c in told["choices"]] == [
        (0, "ab", 2),
        (1, "", 0),
    ]
    assert (told["state"], told["usage"], told["n_tokens"]) == ("running", None, 2)
    assert (told["item"], told["custom_id"], told["scores"]) == ({"a": 0}, "0", {})
    assert api.http.get("/api/requests/5").status_code == 404


def test_chunks_come_page_by_page(api: Api) -> None:
    writer = written(api.db, 3)
    path, found, after = f"/api/requests/{writer.request_id}/chunks", [], None
    while True:
        query = {"limit": 2} | ({} if after is None else {"after": after})
        page = api.http.get(path, params=query).json()
        found += page["data"]
        if (after := page["next"]) is None:
            break
    assert [(each["choice"], each["token_start"]) for each in found] == writer.stored
    assert all(len(each["token_ids"]) == each["n_tokens"] for each in found)
    assert any(each["token_ids"][:2] == [0, 1] for each in found)


def test_a_stream_goes_on_after_any_event(api: Api) -> None:
    writer = written(api.db, 4)
    path = f"/api/requests/{writer.request_id}/stream"
    whole = api.http.get(path)
    assert whole.headers["content-type"].startswith("text/event-stream")
    replayed = [compact(chunk) for chunk in request_chunks(api.db, writer.request_id)]
    told = [*enumerate(replayed, start=1), (None, "[DONE]")]
    assert events(whole.text) == told and len(told) > 5
    for known in range(len(told)):
        rest = api.http.get(path, headers={"last-event-id": str(known)})
        assert events(rest.text) == told[known:]
        assert events(api.http.get(path, params={"after": known}).text) == told[known:]
    assert events(api.http.get(path, params={"after": 10**6}).text) == told[-1:]


def test_what_never_began_is_at_its_end_too(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(1, (0,)))
    store.cancel_job(api.db, job_id, None)
    (request,) = views.requests(api.db, job_id)
    told = events(api.http.get(f"/api/requests/{request.id}/stream").text)
    assert told == [(None, "[DONE]")]


def test_a_running_request_is_streamed_and_resumed(api_with_worker: Api) -> None:
    """The connection is cut after a few events, and what comes then is what was left."""
    api = api_with_worker
    job_id = lifecycle.submit(api.db, small_plan(4, (1,), n=2), api.queue)
    ids = [each.id for each in views.requests(api.db, job_id)]
    for request_id in ids:
        got: list[tuple[int | None, str]] = []
        while not got or got[-1][1] != "[DONE]":
            known = {"last-event-id": str(got[-1][0])} if got else {}
            with api.http.stream(
                "GET", f"/api/requests/{request_id}/stream", headers=known
            ) as answer:
                assert answer.status_code == 200
                got += some(answer, 3)
        replayed = [compact(chunk) for chunk in request_chunks(api.db, request_id)]
        assert got == [*enumerate(replayed, start=1), (None, "[DONE]")]
    tails = api.app.state.context.tails
    assert tails.followed == 0


def some(answer: httpx.Response, most: int) -> Iterator[tuple[int | None, str]]:
    """So many events of an answer, or all that are left."""
    text = ""
    for piece in answer.iter_text():
        text += piece
        whole = text.rpartition("\n\n")[0]
        if len(found := events(whole)) >= most or found[-1:] == [(None, "[DONE]")]:
            break
    yield from events(text.rpartition("\n\n")[0])[:most]


def test_a_comment_comes_while_nothing_else_does(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "SILENT_SECONDS", 0.05)
    job_id = store.insert_job(api.db, small_plan(1, (0,)))
    (request,) = views.requests(api.db, job_id)
    beats = 0
    with api.http.stream("GET", f"/api/requests/{request.id}/stream") as answer:
        for piece in answer.iter_text():
            beats += piece.startswith(":")
            if beats == 3:
                run(api.db, "UPDATE requests SET state = 'cancelled'")
    assert beats >= 3 and piece.endswith("data: [DONE]\n\n")


def test_a_request_that_is_removed_ends_its_stream(api: Api) -> None:
    job_id = store.insert_job(api.db, small_plan(1, (0,)))
    (request,) = views.requests(api.db, job_id)
    with api.http.stream("GET", f"/api/requests/{request.id}/stream") as answer:
        pieces = answer.iter_text()
        assert next(pieces) == "retry: 1000\n\n"
        run(api.db, "DELETE FROM jobs")
        assert list(pieces) == []
