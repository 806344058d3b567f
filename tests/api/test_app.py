"""The application as a whole: every error has the one form, and the document says so."""

import json
from typing import Any

import httpx
import pytest
from fastapi import Body
from pydantic import BaseModel
from sqlalchemy import text

from orchestrator.errors import (
    Conflict,
    NotFound,
    ParameterError,
    PenstockError,
    RequestError,
    SpecError,
    WorkerError,
)
from tests.api.conftest import Api

SECRET = "the-words-of-a-prompt"


class Wanted(BaseModel):
    """What the route of these tests takes."""

    count: int


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, after a look at its form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    error: dict[str, Any] = body["error"]
    return error


def test_health_says_that_the_database_answers(api: Api) -> None:
    answer = api.http.get("/api/health")
    assert answer.status_code == 200
    with api.db.read() as tx:
        schema = tx.scalar(text("SELECT version_num FROM penstock_schema"))
    assert answer.json()["schema"] == schema


def test_health_is_503_while_the_database_is_away(api: Api) -> None:
    with api.db.write() as tx:
        tx.execute(text("ALTER TABLE penstock_schema RENAME TO elsewhere"))
    answer = api.http.get("/api/health")
    error = refused(answer, 503)
    assert error["type"] == "server_error"
    assert answer.headers["retry-after"] == "5"
    assert "penstock.db" not in answer.text


@pytest.mark.parametrize(
    ("raised", "status", "expected"),
    [
        (
            SpecError("job:3: sweep.n", "a number", "'hot'"),
            400,
            ("job:3: sweep.n: expected a number, got 'hot'", None, "invalid_job"),
        ),
        (
            ParameterError("Invalid 'n': no.", "n", "invalid_type"),
            400,
            ("Invalid 'n': no.", "n", "invalid_type"),
        ),
        (NotFound("job", "x"), 404, ("job 'x' does not exist", None, None)),
        (Conflict("job", "x", "has ended"), 409, ("job 'x': has ended", None, None)),
        (RequestError("too_long", "It is."), 400, ("It is.", None, "too_long")),
    ],
)
def test_our_errors_have_their_status(
    api: Api, raised: PenstockError, status: int, expected: tuple[str, str | None, str | None]
) -> None:
    def fail() -> None:
        raise raised

    api.app.add_api_route("/api/fail", fail)
    answer = api.http.get("/api/fail")
    error = refused(answer, status)
    assert (error["message"], error["param"], error["code"]) == expected
    assert error["type"] == "invalid_request_error"
    assert answer.headers.get("x-should-retry") == ("false" if status == 409 else None)


def test_where_the_machine_fails_is_not_told(api: Api) -> None:
    def fail() -> None:
        raise WorkerError("broker", "redis://10.0.0.7 is away")

    api.app.add_api_route("/api/fail", fail)
    answer = api.http.get("/api/fail")
    error = refused(answer, 503)
    assert error["code"] == "broker_unavailable"
    assert "10.0.0.7" not in answer.text
    assert int(answer.headers["retry-after"]) > 0


def test_a_bug_is_500_without_a_word_of_it(api: Api) -> None:
    def fail() -> None:
        raise RuntimeError(SECRET)

    api.app.add_api_route("/api/fail", fail)
    answer = api.http.get("/api/fail")
    assert refused(answer, 500)["type"] == "server_error"
    assert SECRET not in answer.text and "RuntimeError" not in answer.text
    assert api.http.get("/api/health").status_code == 200


def test_a_route_that_is_none_and_a_method_that_is_none(api: Api) -> None:
    assert refused(api.http.get("/v1/nothing"), 404)["type"] == "invalid_request_error"
    answer = api.http.delete("/api/health")
    refused(answer, 405)
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ("{}", "count", "missing_required_parameter"),
        ('{"count": "many"}', "count", "invalid_type"),
        ("{", None, None),
        ("", None, "missing_required_parameter"),
    ],
)
def test_what_validation_refuses(api: Api, body: str, param: str | None, code: str | None) -> None:
    def take(wanted: Wanted = Body()) -> None:  # noqa: B008
        raise AssertionError(wanted)

    api.app.add_api_route("/api/take", take, methods=["POST"])
    headers = {"content-type": "application/json"}
    error = refused(api.http.post("/api/take", content=body, headers=headers), 400)
    assert (error["param"], error["code"]) == (param, code)


def test_every_operation_lists_its_errors_and_describes_its_fields(api: Api) -> None:
    document = api.http.get("/api/openapi.json").json()
    assert document["openapi"].startswith("3.")
    operations = [
        (path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    assert len(operations) > 20
    for path, method, operation in operations:
        assert "summary" in operation, (path, method)
        assert operation.get("description"), (path, method)
        assert "422" not in operation["responses"], (path, method)
        for status in ("400", "403", "404", "408", "413", "429", "500", "503"):
            content = operation["responses"][status]["content"]
            assert "ErrorBody" in json.dumps(content), (path, method, status)


def test_every_field_of_every_answer_is_described(api: Api) -> None:
    schemas = api.http.get("/api/openapi.json").json()["components"]["schemas"]
    silent = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, value in schema.get("properties", {}).items()
        if not value.get("description")
    ]
    assert not silent


def test_keys_are_in_the_document_where_they_are_needed(api: Api, keyed_api: Api) -> None:
    assert "securitySchemes" not in api.http.get("/api/openapi.json").json()["components"]
    document = keyed_api.http.get("/api/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"key", "session"}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert ("security" in operation) == (path != "/api/health"), (path, method)
            assert ("401" in operation["responses"]) == (path != "/api/health")
