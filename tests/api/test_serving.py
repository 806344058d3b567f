"""`penstock serve`, `penstock up` and `penstock keys` as processes; and the server's patience."""

import json
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi.responses import StreamingResponse

from orchestrator.api import server
from orchestrator.api.server import listen
from orchestrator.db import views
from orchestrator.errors import NotFound, ParameterError, WorkerError
from orchestrator.serving import Door, is_loopback
from orchestrator.settings import Settings
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import Plan, plan
from tests.api.conftest import Api
from tests.end_to_end.shell import Shell
from workers.folders.folder import TINY

LINE = re.compile(r"api: (http://\S+) \((.+)\)")
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@contextmanager
def started(shell: Shell, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's URL for the time of the block; it leaves with 0 when it is asked to."""
    process = shell.start(*arguments)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := LINE.search(line):
                break
        else:
            pytest.fail("".join(said))
        yield found.group(1), process
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, err
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_serve_answers_until_it_is_asked_to_leave(shell: Shell) -> None:
    with started(shell, "serve", "--port", "0") as (url, _):
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/api/health").json()["status"] == "ok"
        assert "tiny" in httpx.get(f"{url}/v1/models").text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/api/health")


def test_beyond_loopback_it_wants_a_key_and_says_how_to_make_one(shell: Shell) -> None:
    refused = shell("serve", "--host", "0.0.0.0", "--port", "0")  # noqa: S104
    assert refused.code == 2
    assert "penstock keys create NAME" in refused.err and "--host" in refused.err
    made = shell("keys", "create", "alice", "--scope", "submit", "--owner", "team")
    assert made.code == 0 and made.out.startswith("psk_")
    with started(shell, "serve", "--host", "0.0.0.0", "--port", "0") as (url, _):  # noqa: S104
        here = url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        assert httpx.get(f"{here}/api/jobs").status_code == 401
        key = {"authorization": f"Bearer {made.out.strip()}"}
        assert httpx.get(f"{here}/api/jobs", headers=key).status_code == 200
        strange = {**key, "host": "penstock.example"}
        assert httpx.get(f"{here}/api/jobs", headers=strange).status_code == 200


def test_keys_are_wanted_on_loopback_where_that_is_said(shell: Shell) -> None:
    assert shell("serve", "--keys", "--port", "0").code == 2
    shell("keys", "create", "alice")
    with started(shell, "serve", "--keys", "--port", "0") as (url, _):
        assert httpx.get(f"{url}/api/jobs").status_code == 401
        assert httpx.get(f"{url}/api/health").status_code == 200


def test_keys_are_made_listed_and_revoked_and_shown_once(shell: Shell) -> None:
    secret = shell("keys", "create", "alice", "--scope", "read").out.strip()
    listed = shell("keys", "list")
    assert "alice" in listed.out and secret not in listed.out and secret[:12] in listed.out
    (key,) = json.loads(shell("keys", "list", "--json").out)
    assert key["scopes"] == ["read"] and key["revoked_at"] is None and "hash" not in key
    assert shell("keys", "revoke", key["id"]).out == f"revoked {key['id']}\n"
    assert "revoked" in shell("keys", "list").out
    assert shell("keys", "revoke", "key_none").code == 2
    assert shell("keys", "create", "bob", "--scope", "write").code == 2


def test_up_serves_beside_its_worker(shell: Shell) -> None:
    with started(shell, "up", "--slots", "2", "--port", "0") as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 3


def test_a_port_that_is_taken_is_named(shell: Shell) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        ended = shell("serve", "--port", str(port))
        assert ended.code == 1 and f"127.0.0.1 port {port}" in ended.err
        with pytest.raises(WorkerError), listen("127.0.0.1", port):
            pass
        with listen("127.0.0.1", None, usual=port) as free:
            assert free.getsockname()[1] != port


def test_open_streams_end_with_the_server(api: Api) -> None:
    """In an orderly way: one that is cut off in the middle has no last chunk, and httpx says so."""
    message = {"role": "user", "content": "hi"}
    made = api.http.post(
        "/api/jobs", json={"name": "a", "model": "tiny", "params": {"messages": [message]}}
    )
    job_id = made.json()["id"]
    version = views.version(api.db, job_id)

    async def news() -> AsyncIterator[bytes]:
        yield b": here\n\n"
        await api.app.state.context.tails.changed(job_id, version, 600)
        yield b": gone\n\n"

    async def follow() -> StreamingResponse:
        return StreamingResponse(news(), media_type="text/event-stream")

    api.app.add_api_route("/api/follow", follow, response_model=None)
    served = server.ApiServer(api.app, listen("127.0.0.1", 0))
    served.start()
    with httpx.stream("GET", f"{served.url}/api/follow", timeout=60) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b": here\n\n"
        served.stop()
        assert list(pieces) == [b": gone\n\n"]


def test_whoever_sends_no_whole_head_is_closed(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    host, port = api.url.removeprefix("http://").split(":")
    for sent in (b"", b"GET /api/health HTTP/1.1\r\nHost: ", b"G"):
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(sent)
            assert raw.recv(1) == b""
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        head = f"GET /api/health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        raw.sendall(head)
        assert raw.recv(15) == b"HTTP/1.1 200 OK"
        raw.sendall(head[:20])  # the second request of a connection has the same time
        while raw.recv(4096):
            pass


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_what_counts_as_loopback(host: str, ours: bool) -> None:
    assert is_loopback(host) == ours


def job(model: str) -> Plan:
    """A job that no worker with `tiny` could do: its token does not exist."""
    text = (
        f"name: a\nmodel: {json.dumps(model)}\ndataset: {{items: [{{q: hi}}]}}\n"
        'params: {messages: [{role: user, content: hi}], logit_bias: {"99999": 1}}\n'
    )
    return plan(parse_job(text, file="job.yaml", root=Path.cwd()))


def test_the_door_refuses_what_no_worker_could_do(tmp_path: Path) -> None:
    door = Door.open(Settings(models_dir=tmp_path / "models", cache_dir=tmp_path))
    assert door.models == ("tiny",)
    with pytest.raises(ParameterError, match="logit_bias"):
        door.check(job("tiny"))


def test_a_models_name_is_never_a_path(tmp_path: Path) -> None:
    settings = Settings(models_dir=tmp_path / "models", cache_dir=tmp_path)
    door = Door.open(settings)
    door.check(job(str(TINY)))  # not at hand, so nothing of it is read
    with pytest.raises(NotFound):
        Door.open(settings, ["not-there"])
