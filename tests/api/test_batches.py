"""`/v1/batches` whole: OpenAI's own client, a real server, a worker on `tiny`, files at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.batching import jsonl, line
from tests.api.chatting import SETTINGS, Service, chat, endless, same, serving, slowed, tiny
from tests.api.conftest import Api
from tests.orchestrator.db.builders import rows

Json = dict[str, Any]
ENDED = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    return replace(SETTINGS, files_dir=tmp_path / "files", lease_seconds=1.0)


@pytest.fixture
def service(sqlite_db: Any, sqlite_url: str, settings: Any, model: Any) -> Iterator[Service]:
    with serving(sqlite_url, model=model, settings=settings) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=service.v1, api_key="none", max_retries=0) as client:
        yield client


def make(client: openai.OpenAI, lines: list[Json], **more: Any) -> Any:
    """Upload, and a batch of it."""
    return made_of(client, jsonl(lines), **more)


def made_of(client: openai.OpenAI, raw: bytes, **more: Any) -> Any:
    file = client.files.create(file=("lines.jsonl", raw), purpose="batch")
    return client.batches.create(
        **{
            "input_file_id": file.id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            **more,
        }
    )


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    """The batch once it has ended."""
    return until(lambda: client.batches.retrieve(batch_id), lambda batch: batch.status in ENDED)


def until(look: Callable[[], Any], true: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 120
    while not true(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def content(client: openai.OpenAI, file_id: str | None) -> dict[str, Json]:
    """custom_id -> line."""
    if file_id is None:
        return {}
    lines = client.files.content(file_id).text.splitlines()
    found = {each["custom_id"]: each for each in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


def test_upload_create_poll_download(client: openai.OpenAI, service: Service) -> None:
    """The whole way; what a line says is what the same chat is answered with."""
    bodies = {
        "sum": chat(),
        "two": chat(n=2, temperature=1, seed=7, logprobs=True, top_logprobs=2),
        "streamed": chat(stream=True, stream_options={"include_usage": True}, seed=3),
        "not streamed": chat(stream=False, max_tokens=None),
        "renamed": {**chat(max_tokens=None), "max_completion_tokens": 4, "store": True},
        "a template, not": chat(messages=[{"role": "user", "content": "{{ a }} {% x %}"}]),
    }
    for body in bodies.values():
        if body["max_tokens"] is None:
            del body["max_tokens"]
    too_long = chat(messages=[{"role": "user", "content": "a b c d " * 2000}])
    lines = [line() | {"custom_id": key, "body": body} for key, body in bodies.items()]
    made = make(client, lines, metadata={"of": "me"})
    assert (made.object, made.endpoint) == ("batch", "/v1/chat/completions")
    assert (made.completion_window, made.metadata) == ("24h", {"of": "me"})
    assert made.expires_at == made.created_at + 86_400
    batch = ended(client, made.id)
    assert batch.status == "completed", batch
    assert (batch.model, batch.errors, batch.error_file_id) == ("tiny", None, None)
    assert (batch.request_counts.total, batch.request_counts.completed) == (6, 6)
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at
    output = content(client, batch.output_file_id)
    assert set(output) == set(bodies)
    said = {key: answer["response"]["body"] for key, answer in output.items()}
    spent = [body["usage"] for body in said.values()]
    assert batch.usage.input_tokens == sum(each["prompt_tokens"] for each in spent)
    assert batch.usage.output_tokens == sum(each["completion_tokens"] for each in spent)
    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.expires_at) == ("batch_output", None)
    assert said["renamed"]["usage"]["completion_tokens"] <= 4
    with httpx.Client(base_url=service.v1, timeout=60) as http:
        for key in ("sum", "two", "a template, not"):
            answer = http.post("/chat/completions", json=bodies[key])
            assert same(answer.json()) == same(said[key])
    # What the model's files refuse is found before anything runs, where they are at hand.
    raw = jsonl([line("short")]) + b"\n" + jsonl([line("long", **too_long)])
    refused = ended(client, made_of(client, raw).id)
    assert refused.status == "failed"
    (fault,) = refused.errors.data
    code, param = "context_length_exceeded", "body.messages"
    assert (fault.line, fault.code, fault.param) == (3, code, param)


def test_failures_stand_in_the_error_file(
    sqlite_db: Any, sqlite_url: str, settings: Any, model: Any
) -> None:
    """Where the model's files are not at hand, the worker refuses: one line among others."""
    too_long = [{"role": "user", "content": "a b c d " * 2000}]
    with (
        serving(sqlite_url, model=model, settings=settings, door=False) as service,
        openai.OpenAI(base_url=service.v1, api_key="none") as client,
    ):
        lines = [line("good"), line("long", messages=too_long)]
        after = {"anchor": "created_at", "seconds": 3600}
        batch = ended(client, make(client, lines, output_expires_after=after).id)
        assert (batch.status, batch.request_counts.failed) == ("completed", 1)
        assert set(content(client, batch.output_file_id)) == {"good"}
        answer = content(client, batch.error_file_id)["long"]
        file = client.files.retrieve(batch.error_file_id)
    assert file.expires_at == file.created_at + 3600
    assert answer["response"]["status_code"] == 400
    assert answer["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert answer["error"] is None


def test_validation_says_the_line(client: openai.OpenAI, service: Service) -> None:
    batch = ended(client, make(client, [line("a"), line("b", top_p=2), line("a")]).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors.object == "list"
    assert [(each.line, each.code, each.param) for each in batch.errors.data] == [
        (2, "decimal_above_max_value", "body.top_p"),
        (3, "duplicate_custom_id", "custom_id"),
    ]
    assert (batch.request_counts.total, batch.usage) == (0, None)
    assert rows(service.db, "SELECT id FROM jobs") == []
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_cancel_keeps_what_is_complete(
    client: openai.OpenAI, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, 0.01, monkeypatch)
    short = [line(f"short {n}") for n in range(4)]
    long = [{**line(f"long {n}"), "body": endless(max_tokens=900)} for n in range(8)]
    made = make(client, short + long)
    until(lambda: client.batches.retrieve(made.id), lambda b: b.request_counts.completed >= 4)
    assert client.batches.cancel(made.id).status == "cancelling"
    batch = ended(client, made.id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at >= batch.cancelling_at
    output = content(client, batch.output_file_id)
    errors = content(client, batch.error_file_id)
    assert set(output) | set(errors) == {each["custom_id"] for each in short + long}
    assert not set(output) & set(errors)
    assert {f"short {n}" for n in range(4)} <= set(output)
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    with pytest.raises(openai.ConflictError) as refused:
        client.batches.cancel(made.id)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_what_has_not_ended_by_the_window_expires(
    client: openai.OpenAI, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, 0.02, monkeypatch)
    lines = [{**line(f"long {n}"), "body": endless(max_tokens=900)} for n in range(8)]
    made = make(client, lines, completion_window="2s")
    assert made.expires_at - made.created_at == 2
    batch = ended(client, made.id)
    assert batch.status == "expired"
    assert batch.expired_at >= batch.expires_at
    errors = content(client, batch.error_file_id)
    assert set(errors) | set(content(client, batch.output_file_id)) == {
        each["custom_id"] for each in lines
    }
    assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}


def test_it_expires_although_no_worker_lives(
    sqlite_db: Any, sqlite_url: str, settings: Any
) -> None:
    with (
        serving(sqlite_url, settings=settings, door=False) as service,
        openai.OpenAI(base_url=service.v1, api_key="none") as client,
    ):
        batch = ended(client, make(client, [line("a")], completion_window="1s").id)
        assert (batch.status, batch.output_file_id) == ("expired", None)
        assert set(content(client, batch.error_file_id)) == {"a"}


def test_a_restart_in_between(sqlite_db: Any, sqlite_url: str, settings: Any, model: Any) -> None:
    """The server ends in each state, and another takes the batch up."""
    with (
        serving(sqlite_url, settings=settings, door=False) as service,
        openai.OpenAI(base_url=service.v1, api_key="none") as client,
    ):
        made = make(client, [line("a")])
        until(lambda: client.batches.retrieve(made.id), lambda b: b.status == "in_progress")
        after = make(client, [line("b")])
    with (
        serving(sqlite_url, model=model, settings=settings) as service,
        openai.OpenAI(base_url=service.v1, api_key="none") as client,
    ):
        for batch_id, custom_id in ((made.id, "a"), (after.id, "b")):
            batch = ended(client, batch_id)
            assert batch.status == "completed"
            assert set(content(client, batch.output_file_id)) == {custom_id}


def test_list(client: openai.OpenAI) -> None:
    made = [make(client, [line("a", model="nobody")]).id for _ in range(5)]
    page = client.batches.list(limit=2)
    assert [each.id for each in page.data] == made[:-3:-1]
    assert page.has_more
    assert [each.id for each in page] == made[::-1]
    with pytest.raises(openai.NotFoundError):
        client.batches.list(after="batch_" + "x" * 24)


WRONG: list[tuple[Json, int, str | None]] = [
    ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
    ({"completion_window": "tomorrow"}, 400, "completion_window"),
    ({"completion_window": "0h"}, 400, "completion_window"),
    ({"completion_window": 24}, 400, "completion_window"),
    ({"metadata": {"x" * 65: "y"}}, 400, None),
    ({"metadata": {"x": "y" * 513}}, 400, "metadata.x"),
    ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
    ({"metadata": {"x": 1}}, 400, "metadata.x"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400,
     "output_expires_after.seconds"),
    ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, 400,
     "output_expires_after.anchor"),
    ({"extra": 1}, 400, "extra"),
    ({"input_file_id": "file-" + "x" * 24}, 404, None),
    ({"input_file_id": "../../x\0"}, 404, None),
    ({"input_file_id": None}, 400, "input_file_id"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_what_is_refused(wrong: int, client: openai.OpenAI, service: Service) -> None:
    given, status, param = WRONG[wrong]
    file = client.files.create(file=b"x", purpose="batch")
    body = {
        "input_file_id": file.id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    answer = httpx.post(f"{service.v1}/batches", json=body | given)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert rows(service.db, "SELECT id FROM batches") == []
    assert httpx.get(f"{service.v1}/batches/batch_x").status_code == 404


def test_another_owner(keyed_api: Api) -> None:
    """With keys: what belongs to another does not exist."""
    ann, bob = keyed_api.bearer("ann"), keyed_api.bearer("bob")
    http = keyed_api.http
    form: Any = {"files": {"file": jsonl([line("a")])}, "data": {"purpose": "batch"}}
    file = http.post("/v1/files", headers=ann, **form).json()["id"]
    body = {
        "input_file_id": file,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    assert http.post("/v1/batches", json=body, headers=bob).status_code == 404
    batch = http.post("/v1/batches", json=body, headers=ann).json()["id"]
    for path in (f"/v1/files/{file}", f"/v1/files/{file}/content", f"/v1/batches/{batch}"):
        assert http.get(path, headers=ann).status_code == 200
        assert http.get(path, headers=bob).status_code == 404
    assert http.post(f"/v1/batches/{batch}/cancel", headers=bob).status_code == 404
    assert http.delete(f"/v1/files/{file}", headers=bob).status_code == 404
    for path in ("/v1/files", "/v1/batches"):
        assert http.get(path, headers=bob).json()["data"] == []
        assert len(http.get(path, headers=ann).json()["data"]) == 1
        assert http.get(path).status_code == 401
    assert rows(keyed_api.db, "SELECT DISTINCT owner FROM files") == [("ann",)]
