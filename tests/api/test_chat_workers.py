"""Chats where a worker comes and goes: each test has its own, since a process can have only one."""

from __future__ import annotations

from contextlib import closing

import httpx
import pytest

from orchestrator.db.database import Database
from orchestrator.spec.chunks import fold
from tests.api.chatting import (
    ASK,
    COMPATIBLE,
    LONG,
    SETTINGS,
    assert_too_long,
    chat,
    newest,
    post,
    reached,
    refused,
    request_sent,
    same,
    serving,
    streamed,
    tiny,
    until,
    whole,
)
from tests.api.conftest import Api
from workers.process import LoadedModel, local_worker


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny(2)


def test_a_chat_waits_for_a_worker(
    sqlite_db: Database, sqlite_url: str, model: LoadedModel
) -> None:
    with serving(sqlite_url) as service, closing(request_sent(service, chat())) as sent:
        until(lambda: newest(service.db)["state"] == "queued")
        with reached(service.queue), local_worker(SETTINGS, service.db, service.queue, model):
            received = sent.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_on_both_databases(request: pytest.FixtureRequest, kind: str, model: LoadedModel) -> None:
    with serving(request.getfixturevalue(f"{kind}_url"), model=model) as service:
        *chunks, done = streamed(service, chat(stream_options={"include_usage": True}))
        assert done == "[DONE]"
        assert same(fold(chunks)) == same(whole(service, chat()))


@pytest.mark.parametrize("stream", [True, False])
def test_and_by_the_worker_where_its_files_are_elsewhere(
    sqlite_db: Database, sqlite_url: str, model: LoadedModel, stream: bool
) -> None:
    """No event has been sent then: the status is that of the error."""
    with serving(sqlite_url, model=model, door=False) as service:
        answer = post(service, chat(messages=LONG, stream=stream))
        assert newest(service.db)["error"] == "context_length_exceeded"
    assert answer.status_code == 400
    assert_too_long(answer.json()["error"])


def test_what_common_clients_send_is_taken(
    sqlite_db: Database, sqlite_url: str, model: LoadedModel
) -> None:
    body = chat(**COMPATIBLE)
    del body["max_tokens"]
    body["messages"] = [{"role": "developer", "content": "Be short."}, *ASK]
    with serving(sqlite_url, model=model) as service:
        answer = post(service, body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 3


def test_models_are_those_at_hand_and_those_of_live_workers(
    sqlite_db: Database, sqlite_url: str, model: LoadedModel
) -> None:
    with serving(sqlite_url, model=model, models=("a/b", "zeta")) as service:
        listed = httpx.get(f"{service.v1}/models").json()
        assert [each["id"] for each in listed["data"]] == ["a/b", "tiny", "zeta"]
        assert httpx.get(f"{service.v1}/models/a/b").json() == listed["data"][0]
        answer = httpx.get(f"{service.v1}/models/b")
    text = "The model `b` does not exist or you do not have access to it."
    assert (answer.status_code, answer.json()) == (404, refused(text, None, "model_not_found"))


def test_over_http_other_peoples_do_not_exist(keyed_api_with_worker: Api) -> None:
    api = keyed_api_with_worker
    ann, bob = api.bearer("ann", owner="ann"), api.bearer("bob", owner="bob")
    boss = api.bearer("boss", "admin")
    made = api.http.post("/v1/chat/completions", json=chat(), headers=ann).json()
    assert newest(api.db)["owner"] == "ann"
    path = f"/v1/chat/completions/{made['id']}"
    for seen_by in (ann, boss):
        assert api.http.get(path, headers=seen_by).json() == made
        assert api.http.get("/v1/chat/completions", headers=seen_by).json()["data"] == [made]
    for asked in (path, f"{path}/messages"):
        assert api.http.get(asked, headers=bob).status_code == 404
    assert api.http.delete(path, headers=bob).status_code == 404
    assert api.http.get("/v1/chat/completions", headers=bob).json()["data"] == []
    assert api.http.delete(path, headers=ann).status_code == 200
