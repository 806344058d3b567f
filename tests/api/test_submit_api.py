"""A job comes in over HTTP: YAML or JSON alike, once a key, with no file of this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db import views
from orchestrator.spec import document
from tests.api.conftest import Api
from tests.orchestrator.db.builders import rows

YAML = {"content-type": "application/yaml"}
JOB: dict[str, Any] = {
    "name": "greetings",
    "model": "tiny",
    "dataset": {"items": [{"a": "hé 🎈 \\ud83d", "b": 1}, {"a": "\x7f\u2028", "b": 2.5}]},
    "params": {"messages": [{"role": "user", "content": "Say {{ a }}"}], "max_tokens": 4},
    "sweep": {"temperature": [0, 1]},
}
TEXT = """
name: greetings
model: tiny
dataset:
  items:
    - {a: "hé 🎈 \\\\ud83d", b: 1}
    - {a: "\\x7f\\u2028", b: 2.5}
params:
  messages: [{role: user, content: "Say {{ a }}"}]
  max_tokens: 4
sweep: {temperature: [0, 1]}
"""


def error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_yaml_and_json_are_the_same_job(api: Api) -> None:
    first = api.http.post("/api/jobs", content=TEXT.encode(), headers=YAML)
    second = api.http.post("/api/jobs", json=JOB)
    assert first.status_code == second.status_code == 201, (first.text, second.text)
    one, two = (views.job(api.db, answer.json()["id"]) for answer in (first, second))
    assert one.digest == two.digest and one.id != two.id
    assert one.source == TEXT
    assert document.read(two.source, file="x.yaml").value == JOB
    stored = rows(api.db, "SELECT columns FROM items ORDER BY id")
    assert [json.loads(text) for (text,) in stored] == JOB["dataset"]["items"] * 2
    told = first.json()
    assert first.headers["location"] == f"/api/jobs/{one.id}"
    assert (told["state"], told["requests"], told["owner"]) == ("queued", 4, "")


def test_the_same_key_makes_a_job_once(keyed_api: Api) -> None:
    ann = keyed_api.bearer("ann") | {"idempotency-key": "k1"}
    bob = keyed_api.bearer("bob") | {"idempotency-key": "k1"}
    first = keyed_api.http.post("/api/jobs", json=JOB, headers=ann)
    again = keyed_api.http.post("/api/jobs", json=JOB, headers=ann)
    others = keyed_api.http.post("/api/jobs", json=JOB, headers=bob)
    assert [a.status_code for a in (first, again, others)] == [201, 200, 201]
    assert first.json()["id"] == again.json()["id"] != others.json()["id"]
    assert (first.json()["owner"], others.json()["owner"]) == ("ann", "bob")
    changed = keyed_api.http.post("/api/jobs", json=JOB | {"seed": 5}, headers=ann)
    error(changed, 409)
    assert changed.headers["x-should-retry"] == "false"
    assert rows(keyed_api.db, "SELECT count(*) FROM jobs") == [(2,)]


def test_a_plan_writes_nothing(api: Api) -> None:
    made = api.http.post("/api/plan", json=JOB)
    assert made.status_code == 200
    told = made.json()
    assert (told["n_requests"], told["n_points"], told["max_total_tokens"]) == (4, 2, 16)
    assert told["examples"][0]["messages"][0]["content"] == "Say hé 🎈 \\ud83d"
    assert rows(api.db, "SELECT count(*) FROM jobs") == [(0,)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "job.json"),
        (b"[1]", "a mapping"),
        (b"\xff", "UTF-8"),
        (b'{"name": NaN}', "NaN"),
        (b'{"name": "a", "name": "b"}', "the same key twice"),
        (b'{"name": "a", "params": {}}', "model"),
        (b"[" * 100_000, "job.json"),
        (b'{"name": "\\ud800", "model": "tiny", "params": {}}', "job.json"),
        (b'{"name": ' + b"9" * 10_000 + b"}", "job.json"),
        (json.dumps(JOB | {"nmae": 1}).encode(), "nmae"),
        (json.dumps(JOB | {"params": JOB["params"] | {"top_p": 3}}).encode(), "top_p"),
    ],
)
def test_what_is_no_job_is_refused_with_its_place(api: Api, body: bytes, says: str) -> None:
    for path in ("/api/jobs", "/api/plan"):
        refused = api.http.post(path, content=body, headers={"content-type": "application/json"})
        found = error(refused, 400)
        assert says.lower() in found["message"].lower(), found
        assert found["code"] == "invalid_job"
    assert rows(api.db, "SELECT count(*) FROM jobs") == [(0,)]


def test_other_types_are_refused(api: Api) -> None:
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
        headers = {} if kind is None else {"content-type": kind}
        refused = api.http.post("/api/jobs", content=TEXT.encode(), headers=headers)
        assert error(refused, 415)["code"] == "unsupported_media_type"


def test_n_is_bounded(changed_api: Callable[..., Any]) -> None:
    with changed_api(max_choices=4) as api:
        params = JOB["params"] | {"n": 5}
        refused = api.http.post("/api/jobs", json=JOB | {"params": params})
        assert error(refused, 400)["param"] == "n"


def with_path(path: str) -> dict[str, Any]:
    return JOB | {"dataset": {"path": path}}


def test_no_file_is_read_unless_its_folder_is_open(
    changed_api: Callable[..., Any], tmp_path: Path
) -> None:
    one, two, secret = (tmp_path / name for name in ("one", "two", "secret"))
    for folder in (one, two, secret):
        folder.mkdir()
    line = json.dumps({"a": "x", "b": 1}) + "\n"
    (two / "in.jsonl").write_text(line)
    (secret / "no.jsonl").write_text(line)
    (two / "link.jsonl").symlink_to(secret / "no.jsonl")
    (two / "folder").symlink_to(secret)
    wrong = ["../secret/no.jsonl", str(secret / "no.jsonl"), "link.jsonl", "folder/no.jsonl"]
    with changed_api() as api:
        for path in (*wrong, "in.jsonl", str(two / "in.jsonl")):
            found = error(api.http.post("/api/jobs", json=with_path(path)), 400)
            assert "no folder is open" in found["message"]
    with changed_api(input_roots=f"{one}:{two}") as api:
        for path in (*wrong, "none.jsonl"):
            error(api.http.post("/api/jobs", json=with_path(path)), 400)
        made = api.http.post("/api/jobs", json=with_path("in.jsonl"))
        assert (made.status_code, made.json()["requests"]) == (201, 2)


def test_webhooks_are_checked_and_their_secret_is_never_told(api: Api) -> None:
    secret = "a secret of the test's own"  # not printable: it has spaces
    url = "https://192.0.2.7/told"
    for headers in (
        {"webhook-url": url},
        {"webhook-secret": "long-enough-secret"},
        {"webhook-url": url, "webhook-secret": secret},
        {"webhook-url": "http://127.0.0.1/x", "webhook-secret": "long-enough-secret"},
        {"webhook-url": "file:///etc/passwd", "webhook-secret": "long-enough-secret"},
    ):
        refused = api.http.post("/api/jobs", json=JOB, headers=headers)
        error(refused, 400)
        assert "secret" not in refused.text or "webhook" in refused.text.lower()
    headers = {"webhook-url": "https://93.184.215.14/x", "webhook-secret": "long-enough-secret"}
    made = api.http.post("/api/jobs", json=JOB, headers=headers)
    assert made.status_code == 201, made.text
    assert "long-enough-secret" not in made.text
    job_id = made.json()["id"]
    kept = views.job(api.db, job_id).webhook
    assert kept == {"url": headers["webhook-url"], "secret": headers["webhook-secret"]}
    for path in ("", "/source", "/events", "/requests"):
        assert "long-enough-secret" not in api.http.get(f"/api/jobs/{job_id}{path}").text
