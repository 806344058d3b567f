"""Whatever people send is in no log line: prompts, keys, secrets, names; also when things fail.

A canary is sent through every door of a real `penstock up` whose log is at debug, and looked for
in all that the process said. What only a bug could bring about is brought about in this process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from orchestrator.api.app import create_app
from orchestrator.api.server import ApiServer, listen
from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.db.keys import create_key
from orchestrator.queue import ORCHESTRATOR_QUEUE, model_queue
from orchestrator.settings import Settings
from tests.api.chatting import until
from tests.api.hooks import receiving
from tests.nudges import embedded_queue

CANARY = "canaryQ7xV2"
CHECKOUT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": f"Say {CANARY}"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "user": CANARY}
YAML = f"""
name: {CANARY}
model: tiny
dataset: {{items: [{{custom_id: {CANARY}, a: {CANARY}}}, {{custom_id: b, a: "2"}}]}}
params:
  messages: [{{role: user, content: "{CANARY} {{{{ a }}}}"}}]
  max_tokens: 4
  user: {CANARY}
graders:
  - {{name: {CANARY}, type: contains, expected: "{CANARY}"}}
"""


@contextlib.contextmanager
def up(folder: Path) -> Iterator[tuple[str, Path]]:
    """`penstock up` at debug, wanting keys: its URL, and the file of all that it says."""
    said = folder / "said.txt"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
    given = {"PENSTOCK_LOG": "debug", "PENSTOCK_WEBHOOK_PRIVATE": "1", "PENSTOCK_THREADS": "1"}
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", "up", "--keys", "--port", "0"],
            cwd=folder,
            env={**kept, **given, "PYTHONPATH": str(CHECKOUT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            until(lambda: "api: http" in said.read_text() or process.poll() is not None)
            assert process.poll() is None, said.read_text()
            yield said.read_text().split("api: ")[1].split()[0], said
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, said.read_text()[-2000:]
        finally:
            process.kill()
            process.wait()


def test_what_people_send_is_in_no_log_line(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'penstock.db'}") as db:
        _, key = create_key(db, "alice", ["submit"])
    with receiving([500]) as receiver, up(tmp_path) as (url, said):
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            chats(client)
            jobs(client, receiver.url(path=f"/{CANARY}?token={CANARY}"))
            batches(client)
            doors(client)
            assert receiver.came.acquire(timeout=60)
    log = said.read_text()
    assert log.count("http method=") > 20 and " DEBUG " in log
    assert "webhook.failed" in log
    found = [line for line in log.splitlines() if CANARY in line or key[8:] in line]
    assert not found, found[0][:500]


def chats(client: httpx.Client) -> None:
    done = client.post("/v1/chat/completions", json=CHAT)
    assert done.status_code == 200, done.text
    for each in (
        {**CHAT, "stream": True},
        {**CHAT, "metadata": {CANARY: CANARY}, "store": True},
        {**CHAT, CANARY: 1},
        {**CHAT, "temperature": CANARY},
        {**CHAT, "model": CANARY},
        {**CHAT, "messages": [{"role": "user", "content": CANARY * 2000}]},
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": CANARY}}},
        {**CHAT, "tools": [{"type": "function", "function": {"name": CANARY}}]},
        {**CHAT, "stop": [CANARY], "logit_bias": {CANARY: 1}},
    ):
        client.post("/v1/chat/completions", json=each)
    json_type = {"content-type": "application/json"}
    client.post("/v1/chat/completions", content=b'{"' + CANARY.encode(), headers=json_type)
    client.get(f"/v1/chat/completions/{done.json()['id']}")
    client.get("/v1/chat/completions", params={"model": CANARY, "after": CANARY})


def jobs(client: httpx.Client, hook: str) -> None:
    secret = f"secret-{CANARY}-secret"
    headers = {
        "content-type": "application/yaml",
        "webhook-url": hook,
        "webhook-secret": secret,
        "idempotency-key": CANARY,
    }
    made = client.post("/api/jobs", content=YAML, headers=headers)
    assert made.status_code == 201, made.text
    job = made.json()["id"]
    refused = {**headers, "webhook-url": f"http://user:{CANARY}@10.0.0.1/"}
    assert client.post("/api/jobs", content=YAML, headers=refused).status_code == 400
    for wrong in (YAML + f"\n{CANARY}: 1", YAML.replace("max_tokens: 4", f"max_tokens: {CANARY}")):
        assert client.post("/api/jobs", content=wrong, headers=headers).status_code in (400, 409)
    until(lambda: client.get(f"/api/jobs/{job}").json()["state"] not in ("queued", "running"))
    for path in ("requests", "points", "errors", "events", "results", "source"):
        assert client.get(f"/api/jobs/{job}/{path}").status_code == 200, path
    client.post(f"/api/jobs/{job}/cancel", json={"reason": CANARY})
    client.get("/api/jobs", params={"name": CANARY, "user": CANARY, "state": CANARY})


def batches(client: httpx.Client) -> None:
    line = {"method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    good = json.dumps({"custom_id": CANARY, **line}).encode()
    for lines in (good, good + b"\n" + good, CANARY.encode()):
        upload = {"file": (f"{CANARY}.jsonl", lines)}
        file = client.post("/v1/files", files=upload, data={"purpose": "batch"}).json()
        body = {
            "input_file_id": file["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {CANARY: CANARY},
        }
        batch = client.post("/v1/batches", json=body)
        assert batch.status_code == 200, batch.text
        wait_for(client, batch.json()["id"])
    client.post("/v1/files", files={"file": (CANARY, b"")}, data={"purpose": CANARY})
    client.post("/v1/batches", json={"input_file_id": CANARY, "endpoint": CANARY})


def wait_for(client: httpx.Client, batch: str) -> None:
    ended = ("completed", "failed")
    until(lambda: client.get(f"/v1/batches/{batch}").json()["status"] in ended)


def doors(client: httpx.Client) -> None:
    """Everywhere else that takes a word."""
    for path in ("/", "/api/", "/v1/", "/api/jobs/", "/api/requests/", "/v1/files/", "/jobs/"):
        client.get(path + CANARY, params={CANARY: CANARY}, headers={"accept": "text/html"})
    client.request(CANARY, "/api/jobs")
    client.get("/api/jobs", headers={"authorization": f"Bearer psk_{CANARY}"})
    client.get("/", headers={"cookie": f"penstock_session={CANARY}", "user-agent": CANARY})
    client.post("/login", data={"key": CANARY, "csrf_token": CANARY})
    client.get("/api/jobs", headers={"x-request-id": CANARY, "host": CANARY})


# What only a bug brings about.


@pytest.fixture
def app(sqlite_db: Database) -> Iterator[Any]:
    queue = embedded_queue(model_queue("tiny"), ORCHESTRATOR_QUEUE)
    yield create_app(replace(Settings(), log="debug"), sqlite_db, queue, keys_needed=False)
    queue.close()


def test_a_bugs_traceback_does_not_repeat_what_was_sent(
    app: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError(f"{CANARY} {args} {kw}")

    for name in ("job", "job_status", "jobs_page", "find_job", "request"):
        monkeypatch.setattr(views, name, broken)
    with (
        ApiServer(app, listen("127.0.0.1", 0)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for path in (f"/api/jobs/{CANARY}", f"/api/jobs?name={CANARY}", "/api/requests/1"):
            answer = client.get(path)
            assert answer.status_code == 500 and CANARY not in answer.text, path
    assert caplog.text.count("RuntimeError") >= 3
    assert CANARY not in told(caplog)


def told(caplog: pytest.LogCaptureFixture) -> str:
    """What the product said; the tests' own client logs its URLs."""
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    return "\n".join(logging.Formatter().format(record) for record in ours)


def test_the_databases_errors_do_not_repeat_what_was_to_be_written(db: Database) -> None:
    insert = text(
        "INSERT INTO workers (id, hostname, pid, model, device, slots) "
        "VALUES (:id, 'host', 1, 'tiny', 'cpu', NULL)"
    )
    with pytest.raises(IntegrityError) as refused, db.write() as tx:
        tx.execute(insert, {"id": CANARY})
    logged = logging.LogRecord("x", 40, "x", 1, "x", (), (type(refused.value), refused.value, None))
    shown = logging.Formatter().format(logged)
    assert CANARY not in str(refused.value) and CANARY not in shown
    assert CANARY not in "".join(traceback.format_exception(refused.value))
    assert "workers" in shown
