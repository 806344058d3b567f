"""What is wrong with a chat, as the API says it: status, the four keys, what clients do then."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.db.database import Database
from tests.api.chatting import (
    ASK,
    COMPATIBLE,
    LONG,
    SETTINGS,
    Service,
    assert_too_long,
    chat,
    newest,
    post,
    refused,
    serving,
    until,
)
from tests.orchestrator.db.builders import rows

Json = dict[str, Any]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With at most four choices, the model's files at hand, and nobody who would work."""
    file = tmp_path_factory.mktemp("errors") / "penstock.db"
    settings = replace(SETTINGS, max_choices=4)
    with serving(f"sqlite:///{file}", settings=settings) as running:
        yield running


NOT_JSON = refused("We could not parse the JSON body of your request.")
REFUSALS: list[tuple[Json | bytes, Json]] = [
    (b"", NOT_JSON),
    (b"{", NOT_JSON),
    (b"[]", NOT_JSON),
    (b'{"a": NaN}', NOT_JSON),
    (b"\xff", NOT_JSON),
    (
        {"model": "tiny"},
        refused(
            "Missing required parameter: 'messages'.", "messages", "missing_required_parameter"
        ),
    ),
    (
        {"messages": ASK},
        refused("Missing required parameter: 'model'.", "model", "missing_required_parameter"),
    ),
    (chat(x=1), refused("Unknown parameter: 'x'.", "x", "unknown_parameter")),
    (
        chat(temperature=200),
        refused(
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got "
            "200 instead.",
            "temperature",
            "decimal_above_max_value",
        ),
    ),
    (
        chat(stream_options={"include_usage": True}),
        refused(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            "stream_options",
        ),
    ),
    (
        chat(stream=0),
        refused(
            "Invalid type for 'stream': expected a boolean, but got an integer instead.",
            "stream",
            "invalid_type",
        ),
    ),
    (
        chat(n=5),
        refused(
            "Invalid 'n': integer above maximum value. Expected a value <= 4, but got 5 instead.",
            "n",
            "integer_above_max_value",
        ),
    ),
    (
        chat(max_tokens=3, max_completion_tokens=3),
        refused(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            "max_completion_tokens",
            "invalid_value",
        ),
    ),
    (
        chat(logit_bias={"100265": 1}),
        refused("Invalid key in 'logit_bias': 100265. Maximum value is 502.", "logit_bias"),
    ),
]


@pytest.mark.parametrize(("body", "error"), REFUSALS)
def test_what_is_wrong_is_said_and_nothing_is_written(
    service: Service, body: Json | bytes, error: Json
) -> None:
    before = rows(service.db, "SELECT count(*) FROM jobs")
    answer = post(service, body)
    assert (answer.status_code, answer.json()) == (400, error)
    assert rows(service.db, "SELECT count(*) FROM jobs") == before


@pytest.mark.parametrize("stream", [True, False])
def test_a_model_that_nobody_has(service: Service, stream: bool) -> None:
    answer = post(service, chat(model="gpt-9", stream=stream))
    text = "The model `gpt-9` does not exist or you do not have access to it."
    assert (answer.status_code, answer.json()) == (404, refused(text, None, "model_not_found"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_beyond_the_context_is_refused_at_the_door(service: Service, stream: bool) -> None:
    answer = post(service, chat(messages=LONG, stream=stream))
    assert answer.status_code == 400
    assert_too_long(answer.json()["error"])
    assert newest(service.db)["job"] is None


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_of_ours_is_500_and_not_to_be_tried_again(
    sqlite_db: Database, sqlite_url: str, stream: bool
) -> None:
    """As the rows are when every attempt has ended in vain."""
    failed = (
        "UPDATE requests SET state = 'failed', error_code = 'nan_logits', error_message = 'row 0',"
        " finished_at = CURRENT_TIMESTAMP"
    )
    with serving(sqlite_url) as service, ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(post, service, chat(stream=stream))
        until(lambda: newest(service.db)["state"] == "queued")
        with service.db.write() as tx:
            tx.exec_driver_sql(failed)
        answer = waiting.result()
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    told = {"message": "row 0", "type": "server_error", "param": None, "code": "nan_logits"}
    assert answer.json() == {"error": told}


def test_unless_the_switch_is_off(sqlite_db: Database, sqlite_url: str) -> None:
    settings = replace(SETTINGS, openai_compatible=False)
    with serving(sqlite_url, settings=settings) as service:
        for name, value in COMPATIBLE.items():
            answer = post(service, chat(**{name: value}))
            told = refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
            assert (answer.status_code, answer.json()) == (400, told)
