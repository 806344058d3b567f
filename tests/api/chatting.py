"""A whole service for chats: a real server on the loopback, a real worker on `tiny`, one database.

Knows how they are started and ended; nothing of what is asked.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from celery import _state

from orchestrator.api.app import create_app
from orchestrator.api.server import ApiServer, listen
from orchestrator.db.database import Database
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.plan import Plan
from tests.orchestrator.db.builders import rows
from workers.door import check_plan
from workers.folders.folder import TINY, find_model
from workers.loading.wording import Wording
from workers.process import LoadedModel, LocalWorker, local_worker
from workers.words.chat import eos_token_ids
from workers.words.tokenizer import Tokenizer

Json = dict[str, Any]
CONTEXT = 1024
SETTINGS = Settings(threads=1, flush_seconds=0.05, poll_seconds=0.1, max_context=CONTEXT)
PATH = "/v1/chat/completions"
LONG = [{"role": "user", "content": "word " * 2000}]
COMPATIBLE = {
    "max_completion_tokens": 3,
    "store": True,
    "metadata": {"a": "b"},
    "ignore_eos": True,
    "min_tokens": 2,
    "skip_special_tokens": False,
}
ASK = [{"role": "user", "content": "What is 31 + 44?"}]


@dataclass(frozen=True, slots=True)
class Service:
    """What runs: `url` without a slash at its end; `worker` is None where there is none."""

    url: str
    db: Database
    queue: Queue
    worker: LocalWorker | None

    @property
    def v1(self) -> str:
        """What OpenAI's clients take for their base URL."""
        return f"{self.url}/v1"


@contextmanager
def serving(
    url: str,
    *,
    model: LoadedModel | None = None,
    settings: Settings = SETTINGS,
    door: bool = True,
    models: tuple[str, ...] = ("tiny",),
) -> Iterator[Service]:
    """The service on the database at `url`, with a worker if there is a `model`.

    `door`: the model's files are at hand, and requests are checked against them.
    """
    check: Callable[[Plan], None] = lambda plan: None  # noqa: E731
    if door:
        check = partial(check_plan, wording=Wording.load(TINY), context=CONTEXT)
    with ExitStack() as until_end:
        db = until_end.enter_context(Database.open(url))
        queue = until_end.enter_context(closing(Queue(settings)))
        worker = None
        if model is not None:
            until_end.enter_context(reached(queue))
            worker = until_end.enter_context(local_worker(settings, db, queue, model))
        app = create_app(settings, db, queue, keys_needed=False, models=models, check=check)
        server = until_end.enter_context(ApiServer(app, listen("127.0.0.1", 0)))
        yield Service(server.url, db, queue, worker)


@contextmanager
def reached(queue: Queue) -> Iterator[None]:
    """Nudges reach this queue's worker, and afterwards again whoever they reached before."""
    before = _state.default_app
    queue.app.set_default()
    try:
        yield
    finally:
        if before is not None:
            before.set_default()


def tiny(slots: int = 4) -> LoadedModel:
    """The embedded model, loaded."""
    return LoadedModel.load(find_model("tiny", SETTINGS.models_dir), SETTINGS, slots=slots)


def slowed(model: LoadedModel, seconds: float, patch: Any) -> None:
    """Each decode step takes so long at least."""
    step = model.runner.decode

    def slowly(tokens: Any, lengths: Any) -> Any:
        time.sleep(seconds)
        return step(tokens, lengths)

    patch.setattr(model.runner, "decode", slowly)


def chat(**params: Any) -> Json:
    """A request's body: a short sum, asked of `tiny`, unless said otherwise."""
    return {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 24, **params}


def endless(**params: Any) -> Json:
    """One that never ends by itself before `max_tokens`."""
    ends = {str(id): -100 for id in eos_token_ids(TINY, Tokenizer(TINY))}
    return chat(**{"logit_bias": ends, "max_tokens": 600, "temperature": 1, "seed": 5, **params})


def events(body: bytes) -> list[Any]:
    """What a stream of events says: objects, and `[DONE]` as a string."""
    *told, end = body.decode().split("\n\n")
    assert end == ""
    found = [each for each in told if not each.startswith(":")]
    assert all(each.startswith("data: ") and "\n" not in each for each in found)
    data = [each.removeprefix("data: ") for each in found]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def same(completion: Json) -> Json:
    """A completion without what every one has of its own."""
    calls = iter(range(1000))
    choices = json.loads(json.dumps(completion["choices"]))
    for choice in choices:
        for call in choice["message"].get("tool_calls", ()):
            call["id"] = f"call {next(calls)}"
    kept = {k: v for k, v in completion.items() if k not in ("id", "created", "usage")}
    counted = {k: v for k, v in completion["usage"].items() if k.endswith("_tokens")}
    return kept | {"choices": choices, "usage": counted}


def newest(db: Database) -> Json:
    """The chat that was submitted last: its job's and its request's row."""
    names = ("job", "handle", "owner", "kind", "priority", "request", "state", "error")
    found = rows(
        db,
        "SELECT j.id, j.handle, j.owner, j.kind, j.priority, r.id, r.state, r.error_code"
        " FROM jobs j JOIN requests r ON r.job_id = j.id"
        " WHERE j.planned_at IS NOT NULL ORDER BY j.number DESC LIMIT 1",
    )
    return dict(zip(names, found[0], strict=True)) if found else dict.fromkeys(names)


def n_tokens(db: Database, request: int) -> int:
    """How many tokens of it are stored."""
    query = f"SELECT coalesce(sum(n_tokens), 0) FROM choices WHERE request_id = {request}"
    return int(rows(db, query)[0][0])


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for it."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.01)


def post(service: Service, body: Json | bytes) -> httpx.Response:
    """The answer to a chat, whatever it is; `body` as JSON unless it is bytes."""
    given: Json = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(f"{service.url}{PATH}", timeout=60, **given)


def streamed(service: Service, body: Json) -> list[Any]:
    """What the stream of a chat says, whose head is as it has to be."""
    with httpx.Client(base_url=service.url, timeout=60) as client:
        answer = client.post(PATH, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    return events(answer.content)


def whole(service: Service, body: Json) -> Json:
    """The completion that a chat is answered with."""
    answer = httpx.post(f"{service.url}{PATH}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def request_sent(service: Service, body: Json) -> socket.socket:
    """A socket over which the request has gone, and nothing was read."""
    host, port = service.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    sent = socket.create_connection((host, int(port)), timeout=60)
    sent.sendall(head.encode() + data)
    return sent


def refused(message: str, param: str | None = None, code: str | None = None) -> Json:
    """The body of an error of the client's."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return {"error": error}


def assert_too_long(error: Json) -> None:
    """The error says that the prompt does not fit."""
    assert error["message"].startswith("This model's maximum context length is 1024 tokens.")
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
    assert error["code"] == "context_length_exceeded"
