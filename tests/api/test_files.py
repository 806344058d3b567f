"""`/v1/files` over a real server: uploads of any size, lists, contents, what is refused."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from orchestrator import files
from orchestrator.db.files import NewFile, insert_file
from tests.api.chatting import SETTINGS, Service, serving
from tests.orchestrator.db.builders import rows, run

MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def service(sqlite_db: Any, sqlite_url: str, folder: Path) -> Iterator[Service]:
    """Files of up to a MiB."""
    settings = replace(SETTINGS, files_dir=folder, max_upload_mib=1)
    with serving(sqlite_url, settings=settings, door=False) as running:
        yield running


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.v1, timeout=60) as client:
        yield client


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=service.v1, api_key="none", max_retries=0) as client:
        yield client


def test_what_is_uploaded_comes_back(client: openai.OpenAI, folder: Path) -> None:
    """By OpenAI's own client: create, list, retrieve, content, delete."""
    content = b'{"a": 1}\r\n--x\r\n\x00\xff\n'
    made = client.files.create(file=("lines.jsonl", content), purpose="batch")
    assert (made.object, made.bytes, made.filename) == ("file", len(content), "lines.jsonl")
    assert (made.purpose, made.status, made.expires_at) == ("batch", "processed", None)
    assert abs(made.created_at - time.time()) < 100
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == content
    assert [each.id for each in client.files.list()] == [made.id]
    gone = client.files.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "file")
    assert list(folder.iterdir()) == []
    for refused in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            refused(made.id)


def test_expiry(client: openai.OpenAI, service: Service, folder: Path) -> None:
    """A file past its time does not exist, and the application removes its bytes."""
    after: Any = {"anchor": "created_at", "seconds": 3600}
    made = client.files.create(file=b"x", purpose="batch", expires_after=after)
    assert made.expires_at == made.created_at + 3600
    run(service.db, "UPDATE files SET expires_at = created_at")
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert list(client.files.list()) == []
    deadline = time.monotonic() + 30
    while rows(service.db, "SELECT id FROM files") or list(folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_pages(client: openai.OpenAI, service: Service) -> None:
    """Cursors in both orders, and outputs apart from inputs."""
    made = [client.files.create(file=b"x", purpose="batch").id for _ in range(5)]
    insert_file(service.db, NewFile(files.new_id("file-"), "", "out", "batch_output", 0))
    newest = client.files.list(purpose="batch", limit=2)
    assert [each.id for each in newest.data] == made[:-3:-1]
    assert newest.has_more
    assert [each.id for each in newest] == made[::-1]  # the client follows the cursor
    assert [each.id for each in client.files.list(purpose="batch", order="asc", limit=2)] == made
    assert len(list(client.files.list())) == 6
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-" + "x" * 24)


MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
WRONG: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"files": {"file": b"x"}, "data": {"purpose": "assistants"}}, "purpose", "invalid_value"),
    ({"files": {"file": b"x"}}, "purpose", "missing_required_parameter"),
    ({"files": {"other": b"x"}, "data": {"purpose": "batch"}}, "file",
     "missing_required_parameter"),
    ({"files": {"file": b"x"}, "data": {"purpose": "batch", "extra": "1"}}, "extra",
     "unknown_parameter"),
    ({"files": [("file", b"x"), ("file", b"y")], "data": {"purpose": "batch"}}, "file",
     "invalid_value"),
    ({"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[seconds]": "9"}},
     "expires_after.anchor", "invalid_value"),
    ({"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[anchor]": "created_at",
                                        "expires_after[seconds]": "9"}},
     "expires_after.seconds", "invalid_value"),
    ({"files": {"file": b"x"}, "data": {"purpose": "x" * 5000}}, "purpose", "invalid_value"),
    ({"json": {"purpose": "batch"}}, None, None),
    ({"content": b"--x\r\nnonsense", "headers": MULTIPART}, None, None),
    ({"content": b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc',
      "headers": MULTIPART}, None, None),
]  # fmt: skip


@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_what_is_refused_leaves_nothing(
    wrong: int, http: httpx.Client, service: Service, folder: Path
) -> None:
    given, param, code = WRONG[wrong]
    answer = http.post("/files", **given)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["code"] == code or code is None
    assert not folder.exists() or list(folder.iterdir()) == []
    assert rows(service.db, "SELECT id FROM files") == []


def test_no_name_becomes_a_path(http: httpx.Client, folder: Path, tmp_path: Path) -> None:
    """A file's name is text; ids are looked up, and what is none is not found."""
    for name in ("../../evil", "/etc/passwd", "..\\x", "a\x00b", "<script>", "ü" * 400):
        form = {"file": (name, b"x")}
        made = http.post("/files", files=form, data={"purpose": "batch"})
        assert made.status_code == 200, made.text
        shown = made.json()["filename"]
        assert shown.isprintable()
        assert not {"/", "\\"} & set(shown)
        assert len(shown) <= 255
    assert {path.name[:5] for path in folder.iterdir()} == {"file-"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["files"]
    for id in ("..", "%2e%2e%2fpenstock.db", "file-" + "%00" * 24, ".x.part", "file-x"):
        for path in (f"/files/{id}", f"/files/{id}/content"):
            assert http.get(path).status_code == 404


def test_too_large_is_refused_while_it_comes(
    http: httpx.Client, service: Service, folder: Path
) -> None:
    """Whatever length is announced, or none; nothing of it stays."""
    form = {"file": ("x", b"x" * (MIB + 1))}
    announced = http.post("/files", files=form, data={"purpose": "batch"})
    assert announced.status_code == 413
    assert announced.json()["error"]["code"]
    head, _ = _form(b"batch")
    began: list[bool] = []

    def endless() -> Iterator[bytes]:
        yield head
        while True:  # the server must not wait for an end
            began.append(True)
            yield b"x" * 65536

    status = _sent(http, endless())
    assert status in (413, None)  # None: the answer came as a closed connection, amid the sending
    assert len(began) < 10_000
    exact = http.post("/files", files={"file": b"x" * MIB}, data={"purpose": "batch"})
    assert exact.status_code == 200
    assert rows(service.db, "SELECT bytes FROM files") == [(MIB,)]
    assert [path.name for path in folder.iterdir()] == [exact.json()["id"]]


def _sent(http: httpx.Client, content: Iterator[bytes]) -> int | None:
    try:
        return http.post("/files", content=content, headers=MULTIPART).status_code
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        return None


def _form(purpose: bytes) -> tuple[bytes, bytes]:
    """What stands before the file and after it."""
    field = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose
    head = b'\r\n--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    return field + head, b"\r\n--x--\r\n"


def test_cut_off_uploads_leave_nothing(http: httpx.Client, service: Service, folder: Path) -> None:
    head, _ = _form(b"batch")

    def broken() -> Iterator[bytes]:
        yield head + b"x" * 100_000
        raise ConnectionError("the client is gone")

    with pytest.raises(ConnectionError):
        http.post(
            "/files",
            content=broken(),
            headers=MULTIPART,
        )
    deadline = time.monotonic() + 30
    while not folder.exists() or list(folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert rows(service.db, "SELECT id FROM files") == []


def test_memory_is_flat_at_200_mb(sqlite_db: Any, sqlite_url: str, folder: Path) -> None:
    """A large file goes up and comes down; the process grows by a small part of it."""
    settings = replace(SETTINGS, files_dir=folder, max_upload_mib=201)
    head, tail = _form(b"batch")
    piece = b"0123456789abcdef" * 4096

    def large() -> Iterator[bytes]:
        yield head
        for _ in range(200 * MIB // len(piece)):
            yield piece
        yield tail

    with (
        serving(sqlite_url, settings=settings, door=False) as service,
        httpx.Client(base_url=service.v1, timeout=120) as http,
    ):
        before = _peak_mib()
        made = http.post("/files", content=large(), headers=MULTIPART)
        assert made.json()["bytes"] == 200 * MIB, made.text
        size = 0
        with http.stream("GET", f"/files/{made.json()['id']}/content") as answer:
            assert answer.headers["content-length"] == str(200 * MIB)
            for part in answer.iter_bytes():
                size += len(part)
        grown = _peak_mib() - before
    print(f"200 MiB up and down: the peak of memory grew by {grown:.0f} MiB")
    assert size == 200 * MIB
    assert grown < 40


def _peak_mib() -> float:
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024 if sys.platform != "darwin" else kib / MIB


def test_other_requests_are_answered_meanwhile(http: httpx.Client, service: Service) -> None:
    """Uploads that hang hold up nobody, however many there are."""
    head, tail = _form(b"batch")
    gate, answers = threading.Event(), []

    def slow() -> Iterator[bytes]:
        yield head + b"x"
        gate.wait(60)
        yield tail

    def send() -> None:
        with httpx.Client(base_url=service.v1, timeout=60) as mine:
            answers.append(_sent(mine, slow()))

    threads = [threading.Thread(target=send) for _ in range(60)]
    for thread in threads:
        thread.start()
    try:
        assert http.get("/files").status_code == 200
        assert http.post("/files", files={"file": b"x"}, data={"purpose": "batch"}).is_success
    finally:
        gate.set()
        for thread in threads:
            thread.join()
    assert answers == [200] * 60
