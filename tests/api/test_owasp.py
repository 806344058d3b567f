"""Laws over every route, so that a new one cannot be forgotten: whose things, which keys.

The routes come from the OpenAPI document, and the pages from the application's own list. The
items are those of the OWASP API Security Top 10 (2023); `docs/security.md` maps them.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator import lifecycle
from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.db.tables import ROWS_PER_JOB
from orchestrator.spec.bodies import plan_bodies
from tests.api.conftest import api_at, settings_in
from tests.orchestrator.db.builders import claim_some, rows, run, write

SECRET = "a-webhook-secret-nobody-reads"
NAME = "alices-own-words"
PROMPT = "only-alice-knows-this"
JOB = {
    "name": NAME,
    "model": "tiny",
    "dataset": {"items": [{"a": 1}, {"a": 2}]},
    "params": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8},
    "sweep": {"temperature": [0, 1]},
}
LINE = {
    "custom_id": "one",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]},
}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
OPEN = {"/api/health", "/api/openapi.json"}
"""What anybody may ask for; of the pages, those that `LOGIN` begins with."""
LOGIN = ("/login", "/logout", "/static", "/favicon")
METHODS = ("get", "put", "post", "delete", "patch")


@dataclass(frozen=True)
class World:
    """A server that needs keys, what alice has on it, and the keys of three people."""

    url: str
    db: Database
    app: Any
    keys: dict[str, str]
    ids: dict[str, str]

    def ask(self, who: str | None, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[who]}"} if who else {}
        headers |= more.pop("headers", {})
        with httpx.Client(base_url=self.url, timeout=60) as client:
            return client.request(method, path, headers=headers, **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("owasp")
    with (
        Database.open(f"sqlite:///{folder / 'penstock.db'}") as db,
        api_at(db, settings_in(folder), keys_needed=True) as api,
    ):
        who = {"alice": "submit", "mallory": "submit", "admin": "admin"}
        keys = {name: api.key(name, scope) for name, scope in who.items()}
        keys["reader"] = api.key("reader", "read", owner="alice")
        made = World(api.url, db, api.app, keys, {})
        made.ids.update(alices(made))
        yield made


def alices(world: World) -> dict[str, str]:
    """By the names of path parameters: ids of what is alice's."""
    hook = {"webhook-url": "https://8.8.8.8/", "webhook-secret": SECRET}
    job = world.ask("alice", "POST", "/api/jobs", json=JOB, headers=hook)
    assert job.status_code == 201, job.text
    job_id = job.json()["id"]
    first = finish(world.db)
    plan = plan_bodies("chat", "tiny", [("chat", CHAT)], priority=1)
    queue = world.app.state.context.queue
    lifecycle.submit(world.db, plan, queue, owner="alice", kind="chat")
    finish(world.db)
    ((handle,),) = rows(world.db, "SELECT handle FROM jobs WHERE kind = 'chat'")
    upload = {"file": ("lines.jsonl", json.dumps(LINE).encode() + b"\n")}
    file = world.ask("alice", "POST", "/v1/files", files=upload, data={"purpose": "batch"})
    assert file.status_code == 200, file.text
    body = {
        "input_file_id": file.json()["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    batch = world.ask("alice", "POST", "/v1/batches", json=body)
    assert batch.status_code == 200, batch.text
    settled(world, batch.json()["id"])
    return {
        "job": job_id,
        "request": str(first),
        "completion": handle,
        "file": file.json()["id"],
        "batch": batch.json()["id"],
    }


def settled(world: World, batch_id: str) -> None:
    """Wait until the batch has become a job: from then on nothing changes by itself."""
    for _ in range(600):
        batch = world.ask("alice", "GET", f"/v1/batches/{batch_id}").json()
        if batch["status"] == "in_progress":
            return
        time.sleep(0.05)
    raise AssertionError(batch)


def finish(db: Database) -> int:
    """The first request that is to be claimed succeeds; its id."""
    (claimed,) = claim_some(db, 1)
    done = [write(claimed, 0, (7,), "0", end="stop", whole="0", outcome="succeeded")]
    assert not store.flush(db, done, lease_seconds=60).lost
    return claimed.request_id


KINDS = {
    "job": "job",
    "job_id": "job",
    "given": "job",
    "job_given": "job",
    "request_id": "request",
    "request": "request",
    "completion_id": "completion",
    "file_id": "file",
    "batch_id": "batch",
}
"""Path parameters that name what has an owner."""
UNOWNED = {"model", "name", "version"}
"""Path parameters that name what has none."""


def operations(world: World) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of the OpenAPI document."""
    paths = world.app.openapi()["paths"]
    return [(m, path, item[m]) for path, item in paths.items() for m in METHODS if m in item]


def pages(world: World) -> list[tuple[str, str]]:
    """(method, path) of the routes that the document leaves out."""
    told = {(method, path) for method, path, _ in operations(world)}
    found = {
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for route in walk(world.app.routes)
        for method in route.methods
    }
    return sorted(each for each in found - told if each[0] in METHODS)


def walk(routes: Any) -> Iterator[Any]:
    """Those of the routers, however deep, with the prefixes of all."""
    for route in routes:
        if getattr(route, "methods", None):
            yield route
        else:
            yield from route.effective_route_contexts()


def every(world: World) -> list[tuple[str, str]]:
    return sorted({(m, path) for m, path, _ in operations(world)} | set(pages(world)))


def names(path: str) -> list[str]:
    return re.findall(r"{(\w+)}", path)


def filled(path: str, ids: dict[str, str]) -> str:
    """The path with ids of their kinds in it, and a word for whatever has no owner."""

    def one(found: re.Match[str]) -> str:
        name = found.group(1)
        return ids[KINDS[name]] if name in KINDS else "tiny"

    return re.sub(r"{(\w+)}", one, path)


def is_owned(path: str) -> bool:
    return any(name in KINDS for name in names(path))


def state(db: Database) -> dict[str, Any]:
    """What a stranger must not change."""
    tables = {
        "jobs": "id, paused_at, cancelled_at, cancel_reason, graded_at, owner",
        "requests": "id, state, epoch",
        "files": "id, deleted_at, owner",
        "batches": "id, cancelling_at, cancelled_at, owner",
    }
    return {name: rows(db, f"SELECT {c} FROM {name} ORDER BY id") for name, c in tables.items()}


def test_every_path_parameter_is_known_to_these_laws(world: World) -> None:
    unknown = {n for _, path in every(world) for n in names(path)} - KINDS.keys() - UNOWNED
    assert not unknown, "say in KINDS what it names, or in UNOWNED that it has no owner"


# API1: broken object level authorization


def test_what_is_somebody_elses_does_not_exist(world: World) -> None:
    owned = [(m, path) for m, path in every(world) if is_owned(path)]
    assert len(owned) > 20
    before, wrong = state(world.db), []
    for method, path in owned:
        answer = world.ask("mallory", method, filled(path, world.ids))
        if answer.status_code != 404:
            wrong.append((method, path, answer.status_code, answer.text[:200]))
    assert not wrong
    assert state(world.db) == before


def test_nor_can_it_be_told_from_what_never_was(world: World) -> None:
    never = {
        "job": "job_0000000000000000",
        "request": "999999000000000",
        "completion": "chatcmpl-" + "0" * 24,
        "file": "file-" + "0" * 24,
        "batch": "batch_" + "0" * 24,
    }
    for method, path, _ in operations(world):
        if is_owned(path):
            theirs = world.ask("mallory", method, filled(path, world.ids))
            nobodys = world.ask("mallory", method, filled(path, never))
            texts = [theirs.text, nobodys.text]
            for kind in never:
                texts = [t.replace(world.ids[kind], "ID").replace(never[kind], "ID") for t in texts]
            assert texts[0] == texts[1], (method, path)
            assert theirs.status_code == nobodys.status_code, (method, path)


def test_a_job_named_like_anothers_id_leads_to_itself(world: World) -> None:
    theirs = world.ids["job"]
    decoy = JOB | {"name": theirs, "dataset": {"items": [{"b": 1}]}}
    decoy |= {"params": JOB["params"] | {"messages": [{"role": "user", "content": "mine"}]}}
    decoy |= {"sweep": {"seed": [5, 6, 7]}}
    made = world.ask("mallory", "POST", "/api/jobs", json=decoy)
    assert made.status_code == 201, made.text
    mine, before = made.json()["id"], state(world.db)
    hers = [row for row in before["requests"] if row[0] // ROWS_PER_JOB == 1]
    assert hers
    for method, path in every(world):
        if [name for name in names(path) if KINDS.get(name) == "job"]:
            given = world.ask("mallory", method, filled(path, world.ids))
            own = world.ask("mallory", method, filled(path, {**world.ids, "job": mine}))
            if method == "get" and given.status_code != 404:
                assert told(given, theirs, mine) == told(own, theirs, mine), (method, path)
    after = state(world.db)
    assert [row for row in after["requests"] if row in hers] == hers
    assert after["jobs"][0] == before["jobs"][0] and before["jobs"][0][0] == theirs
    run(world.db, f"DELETE FROM jobs WHERE id = '{mine}'")


def told(answer: httpx.Response, *ids: str) -> str:
    """Without ids, and the numbers that differ from one look to the next."""
    text = answer.text
    for id in ids:
        text = text.replace(id, "ID")
    return re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.]+|csrf\S+|v=\w+", "", text)


def test_its_owner_and_an_admin_find_it(world: World) -> None:
    wrong = []
    for who in ("alice", "reader", "admin"):
        for method, path, _ in operations(world):
            if method == "get" and is_owned(path):
                answer = world.ask(who, method, filled(path, world.ids))
                expected = {200, 409} if "result" in path else {200}
                if answer.status_code not in expected:
                    wrong.append((who, path, answer.status_code, answer.text[:200]))
    assert not wrong


def test_lists_hold_only_ones_own(world: World) -> None:
    told = [*world.ids.values(), NAME, PROMPT]
    for method, path in every(world):
        if method == "get" and not names(path):
            answer = world.ask("mallory", method, path)
            assert answer.status_code in (200, 303, 307, 400), (path, answer.status_code)
            assert not [each for each in told if each in answer.text], path


# API2: broken authentication; API5: broken function level authorization


def test_without_a_key_nothing_is_told_or_done(world: World) -> None:
    before, wrong = state(world.db), []
    for headers in (
        {},
        {"authorization": "Bearer psk_" + "a" * 43},
        {"cookie": "penstock_session=a"},
    ):
        for method, path in every(world):
            if path in OPEN or path.startswith(LOGIN):
                continue
            answer = world.ask(None, method, filled(path, world.ids), headers=headers)
            if not (answer.status_code == 401 or leads_to_login(answer)):
                wrong.append((method, path, answer.status_code))
            assert not [each for each in (NAME, PROMPT) if each in answer.text]
    assert not wrong
    assert state(world.db) == before


def leads_to_login(answer: httpx.Response) -> bool:
    return answer.status_code in (303, 307) and answer.headers["location"].startswith("/login")


def test_who_may_read_changes_nothing(world: World) -> None:
    before, wrong = state(world.db), []
    for method, path in every(world):
        if method != "get" and not path.startswith(LOGIN):
            answer = world.ask("reader", method, filled(path, world.ids))
            if answer.status_code != 403:
                wrong.append((method, path, answer.status_code, answer.text[:200]))
    assert not wrong
    assert state(world.db) == before


# API3: broken object property level authorization


def test_no_answer_holds_a_secret(world: World) -> None:
    hashes = [row[0] for row in rows(world.db, "SELECT hash FROM api_keys")]
    secrets = [SECRET, *world.keys.values(), *hashes]
    for who in ("alice", "admin"):
        for method, path in every(world):
            if method == "get":
                answer = world.ask(who, method, filled(path, world.ids))
                assert not [each for each in secrets if each in answer.text], path


@pytest.mark.parametrize(
    "more", [{"owner": "alice"}, {"kind": "chat"}, {"id": "job_1"}, {"handle": "x"}]
)
def test_what_only_the_server_sets_cannot_be_sent(world: World, more: dict[str, str]) -> None:
    answer = world.ask("mallory", "POST", "/api/jobs", json=JOB | more)
    assert answer.status_code == 400, answer.text
    body = {
        "input_file_id": world.ids["file"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    answer = world.ask("mallory", "POST", "/v1/batches", json=body | more)
    assert answer.status_code in (400, 404), answer.text
    answer = world.ask("mallory", "POST", "/v1/chat/completions", json=CHAT | more)
    assert answer.status_code == 400, answer.text


def test_a_strangers_file_is_no_batchs_input(world: World) -> None:
    body = {
        "input_file_id": world.ids["file"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    before = state(world.db)["batches"]
    answer = world.ask("mallory", "POST", "/v1/batches", json=body)
    assert answer.status_code in (400, 404), answer.text
    assert state(world.db)["batches"] == before


# API4: unrestricted resource consumption


def test_every_list_has_a_largest_page(world: World) -> None:
    for _, path, operation in operations(world):
        for parameter in operation.get("parameters", ()):
            if parameter["name"] == "limit":
                options = parameter["schema"].get("anyOf", [parameter["schema"]])
                numbers = [each for each in options if each.get("type") == "integer"]
                assert numbers and all(0 < each["maximum"] <= 10_000 for each in numbers), path


# API7: server side request forgery


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/", "http://localhost/", "file:///etc/passwd"]
)
def test_no_webhook_goes_inside(world: World, url: str) -> None:
    before = state(world.db)["jobs"]
    headers = {"webhook-url": url, "webhook-secret": SECRET}
    answer = world.ask("mallory", "POST", "/api/jobs", json=JOB, headers=headers)
    assert answer.status_code == 400 and SECRET not in answer.text
    assert state(world.db)["jobs"] == before


def test_no_url_in_a_request_is_fetched(world: World) -> None:
    asked: list[str] = []

    class Tells(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Tells) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/picture.png"
            part = {"type": "image_url", "image_url": {"url": url}}
            message = {"role": "user", "content": [part]}
            chat = world.ask(
                "mallory", "POST", "/v1/chat/completions", json=CHAT | {"messages": [message]}
            )
            assert chat.status_code == 400, chat.text
            job = JOB | {"dataset": {"path": url}}
            assert world.ask("mallory", "POST", "/api/jobs", json=job).status_code == 400
        finally:
            server.shutdown()
            thread.join()
    assert not asked


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "penstock.db", "~/x.jsonl"])
def test_no_file_of_the_server_is_a_dataset(world: World, path: str) -> None:
    answer = world.ask("mallory", "POST", "/api/jobs", json=JOB | {"dataset": {"path": path}})
    assert answer.status_code == 400, answer.text
    assert "root:" not in answer.text


# API8: security misconfiguration; API9: improper inventory management


def test_every_answer_has_the_headers_that_keep_browsers_safe(world: World) -> None:
    for who in (None, "alice"):
        for method, path in every(world):
            answer = (
                world.ask(who, method, filled(path, world.ids))
                if who is None or method == "get"
                else None
            )
            if answer is not None:
                assert answer.headers["x-content-type-options"] == "nosniff", path
                assert "default-src" in answer.headers["content-security-policy"], path
                assert "unsafe-" not in answer.headers["content-security-policy"], path
                assert answer.headers["x-request-id"].startswith("req_"), path


def test_what_the_document_leaves_out_are_pages(world: World) -> None:
    assert not [path for _, path in pages(world) if path.startswith("/v1")]
    hidden = {path for _, path in pages(world) if path.startswith("/api")}
    assert hidden <= {"/api/openapi.json"}


def test_every_operation_says_who_may_and_how_it_fails(world: World) -> None:
    for method, path, operation in operations(world):
        assert operation.get("summary"), (method, path)
        told = set(operation["responses"])
        assert {"400", "404", "429", "500"} <= told, (method, path)
        if path not in OPEN:
            assert operation["security"] and {"401", "403"} <= told, (method, path)


def test_the_page_on_security_names_tests_that_exist() -> None:
    top = Path(__file__).parents[2]
    page = (top / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len({item for item in re.findall(r"\bAPI(\d+)", page)}) == 10
    assert len(named) >= 10
    for file, test in named:
        assert (top / file).is_file(), file
        assert not test or f"def {test}(" in (top / file).read_text(), f"{file}::{test}"
