"""Keys: made, believed, refused, revoked; and what a browser may be made to ask."""

import hashlib
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from orchestrator.api import auth
from orchestrator.api.auth import Admin, Reader, Submitter
from orchestrator.api.origins import COOKIE, csrf_token
from orchestrator.db.database import Database
from orchestrator.db.keys import create_key, find_key, has_keys, keys, revoke_key
from orchestrator.errors import NotFound, SpecError
from tests.api.conftest import Api


def reads(caller: Reader) -> dict[str, Any]:
    return {"owner": caller.owner, "sees": caller.sees}


def submits(caller: Submitter) -> dict[str, Any]:
    return {"owner": caller.owner, "sees": caller.sees}


def administers(caller: Admin) -> dict[str, Any]:
    return {"owner": caller.owner, "sees": caller.sees}


@pytest.fixture
def doors(keyed_api: Api) -> Api:
    """A route for each scope, at a server that wants keys."""
    return with_doors(keyed_api)


@pytest.fixture
def open_doors(api: Api) -> Api:
    """The same without keys."""
    return with_doors(api)


def with_doors(api: Api) -> Api:
    for path, route in (("read", reads), ("submit", submits), ("admin", administers)):
        api.app.add_api_route(f"/api/doors/{path}", route, methods=["GET", "POST"])
    return api


# --- rows -----------------------------------------------------------------------------------------


def test_a_key_is_kept_as_its_hash_alone(db: Database) -> None:
    key, secret = create_key(db, "alice", ["submit", "read"])
    assert secret.startswith("psk_") and len(secret) == 4 + 43
    assert (key.owner, key.scopes) == ("alice", ("read", "submit"))
    with db.read() as tx:
        row = " ".join(map(str, tx.execute(text("SELECT * FROM api_keys")).one()))
    assert hashlib.sha256(secret.encode()).hexdigest() in row
    assert secret not in row and secret[:12] in row


def test_keys_are_listed_found_and_revoked(db: Database) -> None:
    assert not has_keys(db)
    first, secret = create_key(db, "a")
    second, _ = create_key(db, "b", ["admin"], "team")
    assert {each.id for each in keys(db)} == {first.id, second.id}
    assert find_key(db, hashlib.sha256(secret.encode()).hexdigest()) == first
    assert revoke_key(db, first.prefix).revoked_at is not None
    assert revoke_key(db, first.id).revoked_at is not None
    assert find_key(db, hashlib.sha256(secret.encode()).hexdigest()) is None
    assert has_keys(db)
    revoke_key(db, second.id)
    assert not has_keys(db)
    with pytest.raises(NotFound):
        revoke_key(db, "key_none")


@pytest.mark.parametrize(
    ("name", "scopes", "owner"),
    [("", ["read"], None), ("a", [], None), ("a", ["write"], None), ("a", ["read"], "x\ny")],
)
def test_a_key_that_makes_no_sense_is_refused(
    sqlite_db: Database, name: str, scopes: list[str], owner: str | None
) -> None:
    with pytest.raises(SpecError):
        create_key(sqlite_db, name, scopes, owner)


# --- scopes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        ("read", {"read"}),
        ("submit", {"read", "submit"}),
        ("admin", {"read", "submit", "admin"}),
    ],
)
def test_a_scope_opens_its_doors_and_no_other(doors: Api, scope: str, allowed: set[str]) -> None:
    headers = doors.bearer("alice", scope)
    for door in ("read", "submit", "admin"):
        answer = doors.http.get(f"/api/doors/{door}", headers=headers)
        assert answer.status_code == (200 if door in allowed else 403), answer.text
        if answer.status_code == 403:
            assert answer.json()["error"]["code"] == "insufficient_scope"


def test_an_owner_sees_their_own_and_an_admin_all(doors: Api) -> None:
    found = doors.http.get("/api/doors/read", headers=doors.bearer("a", "read", owner="team"))
    assert found.json() == {"owner": "team", "sees": "team"}
    found = doors.http.get("/api/doors/read", headers=doors.bearer("root", "admin"))
    assert found.json() == {"owner": "root", "sees": None}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer psk_wrong"},
        {"authorization": "Bearer"},
        {"authorization": "Basic YTpi"},
        {"authorization": b"Bearer \xff\xfe"},
        {"cookie": f"{COOKIE}=psk_wrong"},
    ],
)
def test_without_a_valid_key_nothing_opens(doors: Api, headers: Any) -> None:
    for method in ("GET", "POST"):
        answer = doors.http.request(method, "/api/doors/read", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_header_goes_before_the_cookie(doors: Api) -> None:
    cookie = {"cookie": f"{COOKIE}={doors.key('alice')}"}
    assert doors.http.get("/api/doors/read", headers=cookie).status_code == 200
    both = {**cookie, "authorization": "Bearer psk_wrong"}
    assert doors.http.get("/api/doors/read", headers=both).status_code == 401


def test_a_revoked_key_is_refused_once_it_is_looked_up_again(
    doors: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = doors.bearer("alice")
    assert doors.http.get("/api/doors/read", headers=headers).status_code == 200
    (key,) = keys(doors.db)
    assert key.last_used_at is not None
    revoke_key(doors.db, key.id)
    assert doors.http.get("/api/doors/read", headers=headers).status_code == 200  # believed yet
    later = auth.time.monotonic() + auth.BELIEVED_SECONDS
    monkeypatch.setattr("orchestrator.api.auth.time.monotonic", lambda: later)
    assert doors.http.get("/api/doors/read", headers=headers).status_code == 401


# --- what a browser may be made to ask ------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", ""]
)
def test_a_name_that_points_here_opens_nothing_without_keys(open_doors: Api, host: str) -> None:
    answer = open_doors.http.get("/api/doors/read", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1:80", "[::1]:8000"])
def test_the_machines_own_names_do(open_doors: Api, host: str) -> None:
    answer = open_doors.http.post("/api/doors/submit", headers={"host": host})
    assert answer.status_code == 200 and answer.json()["sees"] is None


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "http://[::1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_another_site_changes_nothing(open_doors: Api, doors: Api, headers: Any) -> None:
    answer = open_doors.http.post("/api/doors/submit", headers=headers)
    assert answer.json()["error"]["code"] == "cross_site"
    cookie = {"cookie": f"{COOKIE}={doors.key('alice')}"}
    answer = doors.http.post("/api/doors/submit", headers={**headers, **cookie})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
    # What it may make a browser read, it cannot see: no header lets it.
    answer = open_doors.http.get("/api/doors/read", headers=headers)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_key_in_a_header_is_no_browsers_doing(doors: Api) -> None:
    headers = {**doors.bearer("alice"), "origin": "https://app.example"}
    assert doors.http.post("/api/doors/submit", headers=headers).status_code == 200


def test_a_form_needs_the_pages_token(doors: Api) -> None:
    def show(request: auth.Request, caller: Reader) -> dict[str, str]:
        return {"token": csrf_token(request)}

    doors.app.add_api_route("/api/doors/token", show)
    own = {"cookie": f"{COOKIE}={doors.key('alice')}", "origin": doors.url}
    token = doors.http.get("/api/doors/token", headers=own).json()["token"]

    def post(**how: Any) -> httpx.Response:
        headers = {**own, **how.pop("headers", {})}
        return doors.http.post("/api/doors/submit", headers=headers, **how)

    assert post(json={}).status_code == 200
    assert post().status_code == 200
    assert post(data={"csrf_token": token}).status_code == 200
    assert post(data={"a": "b"}, headers={"x-csrf-token": token}).status_code == 200
    for refused in (
        post(data={"a": "b"}),
        post(data={"csrf_token": token[::-1]}),
        post(content="a", headers={"content-type": "text/plain"}),
        post(files={"file": b"a"}),
        post(data={"csrf_token": token}, headers={"cookie": f"{COOKIE}={doors.key('bob')}"}),
    ):
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "csrf"


def test_the_sessions_cookie_is_out_of_reach_of_scripts_and_other_sites(doors: Api) -> None:
    def enter(request: auth.Request, response: auth.Response) -> None:
        auth.sign_in(request, response, "psk_x")

    def leave(response: auth.Response) -> None:
        auth.sign_out(response)

    doors.app.add_api_route("/api/doors/enter", enter)
    doors.app.add_api_route("/api/doors/leave", leave)
    cookie = doors.http.get("/api/doors/enter").headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    behind = {"x-forwarded-proto": "https"}
    assert (
        "secure" in doors.http.get("/api/doors/enter", headers=behind).headers["set-cookie"].lower()
    )
    assert "max-age=0" in doors.http.get("/api/doors/leave").headers["set-cookie"].lower()
