"""Headers of every answer: of routes, of errors, of what no route takes."""

import httpx
import pytest

from orchestrator.api.headers import HEADERS
from tests.api.conftest import Api


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/health", 200),
        ("GET", "/api/openapi.json", 200),
        ("GET", "/api/jobs/none", 404),
        ("GET", "/nothing", 404),
        ("DELETE", "/api/health", 405),
        ("POST", "/api/jobs", 415),
    ],
)
def test_every_answer_is_safe_in_a_browser(api: Api, method: str, path: str, status: int) -> None:
    answer = api.http.request(method, path)
    assert answer.status_code == status, answer.text
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    assert "server" not in answer.headers


def test_a_refusal_before_any_route_has_them_too(api: Api) -> None:
    answer = api.http.get("/api/health", headers={"host": "evil.example"})
    assert answer.status_code == 403
    assert answer.headers["content-security-policy"] == HEADERS["content-security-policy"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_nothing_inline_is_allowed() -> None:
    policy = HEADERS["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy


def test_a_route_keeps_what_it_says_itself(api: Api) -> None:
    def kept() -> httpx.Response:
        from fastapi.responses import Response

        return Response(headers={"cache-control": "no-cache"})  # type: ignore[return-value]

    api.app.add_api_route("/api/kept", kept, response_model=None)
    assert api.http.get("/api/kept").headers["cache-control"] == "no-cache"


def test_no_two_requests_have_one_id(api: Api) -> None:
    given = {"x-request-id": "mine"}
    ids = {api.http.get("/api/health", headers=given).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5 and "mine" not in ids
