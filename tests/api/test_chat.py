"""Chats over HTTP, streamed and whole: the stream's grammar, the rows behind it, who leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest

from orchestrator import lifecycle
from orchestrator.db.database import Database
from orchestrator.follow import request_chunks
from orchestrator.spec.chunks import fold
from tests.api.chatting import (
    PATH,
    SETTINGS,
    Service,
    chat,
    endless,
    events,
    n_tokens,
    newest,
    request_sent,
    same,
    serving,
    slowed,
    streamed,
    tiny,
    until,
    whole,
)
from workers.process import LoadedModel

Json = dict[str, Any]
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
JSON = [{"role": "user", "content": "Say something in JSON."}]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny()


@pytest.fixture(scope="module")
def service(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("chat") / "penstock.db"
    with serving(f"sqlite:///{file}", model=model) as running:
        yield running


@pytest.fixture
def slow(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 tokens take six seconds at least: what happens in the middle happens there."""
    slowed(model, 0.01, monkeypatch)


def test_a_whole_answer_is_what_the_row_holds(service: Service) -> None:
    answer = httpx.post(f"{service.url}{PATH}", json=chat(), timeout=60)
    completion, row = answer.json(), newest(service.db)
    assert completion["choices"][0]["message"]["content"] == "31 + 44 = 75"
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["id"] == row["handle"]
    assert (row["kind"], row["owner"], row["state"]) == ("chat", "", "succeeded")
    assert row["priority"] == SETTINGS.chat_priority
    assert completion == fold(request_chunks(service.db, row["request"])) | {
        "usage": completion["usage"]
    }
    assert completion["usage"]["completion_tokens"] == n_tokens(service.db, row["request"])
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert answer.headers["openai-version"] == "2020-10-01"


def test_the_grammar_of_a_stream(service: Service) -> None:
    *chunks, done = streamed(service, chat())
    assert done == "[DONE]"
    assert chunks[0]["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in chunk for chunk in chunks)
    heads = [{k: v for k, v in chunk.items() if k != "choices"} for chunk in chunks]
    assert all(head == heads[0] for head in heads)
    assert heads[0]["object"] == "chat.completion.chunk"
    assert heads[0]["system_fingerprint"].startswith("fp_")
    assert chunks == list(request_chunks(service.db, newest(service.db)["request"]))


def test_usage_comes_last_where_it_is_asked_for(service: Service) -> None:
    *chunks, done = streamed(service, chat(stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    used = chunks[-1]["usage"]
    assert used["completion_tokens"] == n_tokens(service.db, newest(service.db)["request"])
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.5, "seed": 3, "n": 3, "logprobs": True, "top_logprobs": 2},
        {"temperature": 1.5, "seed": 4, "stop": ["e", "7"], "service_tier": "auto"},
        {"tools": TOOLS, "tool_choice": "required", "seed": 2, "max_tokens": 90},
        {"functions": [WEATHER], "function_call": {"name": "get_weather"}, "max_tokens": 90},
        {"messages": JSON, "response_format": {"type": "json_object"}, "max_tokens": 60},
        {"max_tokens": 1, "seed": 2**63 - 1, "user": "somebody"},
    ],
    ids=["choices", "stop", "tools", "functions", "json", "length"],
)
def test_a_stream_folds_to_the_whole_answer_of_the_same_seed(
    service: Service, params: Json
) -> None:
    *chunks, _ = streamed(service, chat(**params, stream_options={"include_usage": True}))
    assert same(fold(chunks)) == same(whole(service, chat(**params)))


def test_without_a_seed_each_chat_draws_its_own(service: Service) -> None:
    body = endless(temperature=2, max_tokens=60, seed=None)
    texts = {json.dumps(whole(service, body)["choices"]) for _ in range(3)}
    assert len(texts) > 1


def test_messages_are_no_templates(service: Service) -> None:
    asked = [{"role": "user", "content": "Repeat exactly: {{ a }}"}]
    whole(service, chat(messages=asked, max_tokens=2))


@pytest.mark.usefixtures("slow")
def test_the_first_token_is_told_while_the_rest_is_made(service: Service) -> None:
    with (
        httpx.Client(base_url=service.url, timeout=60) as client,
        client.stream("POST", PATH, json=endless(stream=True)) as answer,
    ):
        first = next(answer.iter_bytes())
        assert events(first)[0]["choices"][0]["delta"]["role"] == "assistant"
        row = newest(service.db)
        assert row["state"] == "running"
        assert 0 < n_tokens(service.db, row["request"]) < 600
    until(lambda: newest(service.db)["state"] == "cancelled")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_cancels(service: Service, stream: bool) -> None:
    """By closing the socket in the middle, before which nothing but the request was sent."""
    before = newest(service.db)["job"]
    with closing(request_sent(service, endless(stream=stream))):
        until(lambda: newest(service.db)["job"] != before)
        until(lambda: n_tokens(service.db, newest(service.db)["request"]) > 0)
    until(lambda: newest(service.db)["state"] == "cancelled")
    assert n_tokens(service.db, newest(service.db)["request"]) < 600


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_any_token_cancels_too(sqlite_url: str, stream: bool) -> None:
    with serving(sqlite_url) as service:  # no worker: it stays queued
        with closing(request_sent(service, chat(stream=stream))):
            until(lambda: newest(service.db)["state"] == "queued")
        until(lambda: newest(service.db)["state"] == "cancelled")


def test_leaving_after_the_end_changes_nothing(service: Service) -> None:
    with closing(request_sent(service, chat(stream=True))) as sent:
        received = b""
        while b"[DONE]" not in received:
            received += sent.recv(65536)
    assert newest(service.db)["state"] == "succeeded"
    whole(service, chat())  # whatever a close would still do is done by now
    assert newest(service.db)["state"] == "succeeded"


@pytest.mark.usefixtures("slow")
def test_a_stream_whose_job_is_cancelled_ends_in_an_error(service: Service) -> None:
    with (
        httpx.Client(base_url=service.url, timeout=60) as client,
        client.stream("POST", PATH, json=endless(stream=True)) as answer,
    ):
        body = answer.iter_bytes()
        received = next(body)
        lifecycle.cancel(service.db, newest(service.db)["job"], "by hand")
        received += b"".join(body)
    *chunks, last = events(received)
    assert last == {
        "error": {
            "message": "The request was cancelled.",
            "type": "invalid_request_error",
            "param": None,
            "code": "cancelled",
        }
    }
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_a_stream_with_nothing_to_say_says_that_it_is_there(
    sqlite_db: Database, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong after that is an event: the status has been sent."""
    monkeypatch.setattr("orchestrator.api.openai.chat.SILENT_SECONDS", 0.05)
    with (
        serving(sqlite_url) as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
        client.stream("POST", PATH, json=chat(stream=True)) as answer,
    ):
        assert answer.status_code == 200
        body = answer.iter_bytes()
        assert next(body).startswith(b": still here\n\n")
        lifecycle.cancel(service.db, newest(service.db)["job"])
        last = b"".join(body)
    assert events(last)[-1]["error"]["code"] == "cancelled"


def test_a_server_that_stops_ends_its_streams(sqlite_db: Database, sqlite_url: str) -> None:
    """And cancels what nobody waits for any more; whoever has no answer yet may try again."""
    with ThreadPoolExecutor(1) as beside:
        with serving(sqlite_url) as service:
            url = f"{service.url}{PATH}"
            waiting = beside.submit(httpx.post, url, json=chat(stream=True), timeout=60)
            until(lambda: newest(service.db)["state"] == "queued")
        answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert "retry-after" in answer.headers
    assert newest(sqlite_db)["state"] == "cancelled"
