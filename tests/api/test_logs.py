"""A line for each request says which route, how, whose; and nothing of what was sent."""

import logging
import re
import time

import pytest

from orchestrator.api.logs import RequestIdFilter, places
from tests.api.conftest import Api

CANARY = "canary-7d1f"
LINE = re.compile(
    r"http method=(\S+) route=(\S+) status=(\S+) ms=[\d.]+ key=(\S+) request=(req_\w+)"
)


def ours(caplog: pytest.LogCaptureFixture) -> str:
    """What was logged but for the client of the tests, which runs in this process."""
    told = (f"{each.name} {each.getMessage()} {each.exc_text}" for each in caplog.records)
    return "\n".join(each for each in told if not each.startswith("http"))


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[tuple[str, ...]]:
    """That many lines; the last comes when its answer may be here already."""
    for _ in range(1000):
        found = [match.groups() for each in caplog.messages if (match := LINE.fullmatch(each))]
        if len(found) >= count:
            break
        time.sleep(0.01)
    return found


def test_a_line_has_the_routes_template_and_the_keys_id(
    keyed_api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = keyed_api.key("alice")
    headers = {"authorization": f"Bearer {secret}"}
    answer = keyed_api.http.get(f"/api/jobs/{CANARY}?wait={CANARY}", headers=headers)
    ((method, route, status, key, id),) = lines(caplog, 1)
    assert (method, status) == ("GET", str(answer.status_code))
    assert re.fullmatch(r"/api/jobs/\{\w+\}", route)
    assert key.startswith("key_") and id == answer.headers["x-request-id"]
    assert CANARY not in ours(caplog) and secret not in ours(caplog)


def test_a_path_of_no_route_and_a_wrong_key_are_not_repeated(
    keyed_api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"authorization": f"Bearer psk_{CANARY}", "user-agent": CANARY}
    keyed_api.http.get(f"/{CANARY}", headers=headers)
    keyed_api.http.post("/api/jobs", content=CANARY, headers=headers)
    found = lines(caplog, 2)
    assert [each[1:4] for each in found] == [("-", "404", "-"), ("/api/jobs", "401", "-")]
    assert CANARY not in ours(caplog)


def test_a_bug_is_logged_by_its_places_alone(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        try:
            raise KeyError(CANARY)
        except KeyError as error:
            raise RuntimeError(CANARY) from error

    api.app.add_api_route("/api/fail", fail)
    caplog.set_level(logging.DEBUG)
    answer = api.http.get("/api/fail")
    assert answer.status_code == 500
    (told,) = [each for each in caplog.messages if each.startswith("http.failed")]
    assert "error=RuntimeError,from KeyError" in told
    assert f"{__file__}:" in told and answer.headers["x-request-id"] in told
    assert "Traceback" not in ours(caplog) and CANARY not in ours(caplog)


def test_what_is_logged_while_a_request_is_handled_has_its_id(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    def tell() -> None:
        logging.getLogger("penstock.test").warning("it=%s", "done")

    api.app.add_api_route("/api/tell", tell)
    caplog.handler.addFilter(RequestIdFilter())
    answer = api.http.get("/api/tell")
    assert f"it=done request={answer.headers['x-request-id']}" in caplog.messages


def test_a_group_of_errors_is_told_by_its_kinds() -> None:
    group = ExceptionGroup(CANARY, [ValueError(CANARY), TypeError(CANARY)])
    assert places(group) == "error=ExceptionGroup,ValueError,TypeError at="
