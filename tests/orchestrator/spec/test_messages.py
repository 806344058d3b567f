"""Which messages may follow which, and what each may hold."""

from typing import Any

import pytest

from orchestrator.errors import ParameterError
from orchestrator.spec.params import parse_params

USER = {"role": "user", "content": "Hi"}


def call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def parse(*messages: Any) -> tuple[Any, ...]:
    return parse_params({"messages": list(messages), "model": "tiny"}).messages


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "", "name": "a"}, USER],
        [{**USER, "name": "a-b_C9"}],
        [USER, {"role": "assistant", "content": "Hello", "name": "x"}, USER],
        [USER, {"role": "assistant", "content": None, "tool_calls": [call("a"), call("b")]},
         {"role": "tool", "content": "2", "tool_call_id": "b"},
         {"role": "tool", "content": [{"type": "text", "text": "1"}], "tool_call_id": "a"}, USER],
        [USER, {"role": "assistant", "tool_calls": [call("a")]},
         {"role": "tool", "content": "1", "tool_call_id": "a"}],
        [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}},
         {"role": "function", "name": "f", "content": None}],
        [USER, {"role": "assistant", "content": None, "refusal": "No."}],
    ],
)  # fmt: skip
def test_taken_as_received(messages: list[Any]) -> None:
    joined = [m if m.get("content") != [{"type": "text", "text": "1"}] else {**m, "content": "1"}
              for m in messages]  # fmt: skip
    assert list(parse(*messages)) == joined


def test_text_parts_are_joined_without_separator() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]
    assert parse({"role": "user", "content": parts})[0]["content"] == "ab\n"
    refusal = [{"type": "refusal", "refusal": "No."}]
    assert parse(USER, {"role": "assistant", "content": refusal})[1]["content"] == "No."


ORPHAN = (
    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message "
    "with 'tool_calls'."
)
UNANSWERED = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to "
    "each 'tool_call_id'. The following tool_call_ids did not have response messages: "
)
CALLS = {"role": "assistant", "content": None, "tool_calls": [call("a"), call("b")]}
ANSWER = {"role": "tool", "content": "1", "tool_call_id": "a"}


@pytest.mark.parametrize(
    ("messages", "message", "param", "code"),
    [
        ([1], "Invalid type for 'messages[0]': expected an object, but got an integer instead.",
         "messages[0]", "invalid_type"),
        ([{}], "Missing required parameter: 'messages[0].role'.", "messages[0].role",
         "missing_required_parameter"),
        ([{"role": "x", "content": ""}], "Invalid value: 'x'. Supported values are: 'system', "
         "'assistant', 'user', 'function', and 'tool'.", "messages[0].role", "invalid_value"),
        ([USER, {"role": "user"}], "Missing required parameter: 'messages[1].content'.",
         "messages[1].content", "missing_required_parameter"),
        ([{**USER, "x": 1}], "Unknown parameter: 'messages[0].x'.", "messages[0].x",
         "unknown_parameter"),
        ([{"role": "user", "content": 1}], "Invalid type for 'messages[0].content': expected one "
         "of a string or array of objects, but got an integer instead.", "messages[0].content",
         "invalid_type"),
        ([{"role": "user", "content": None}], "Invalid type for 'messages[0].content': expected "
         "one of a string or array of objects, but got null instead.", "messages[0].content",
         "invalid_type"),
        ([{"role": "user", "content": []}], "Invalid 'messages[0].content': empty array. Expected "
         "an array with minimum length 1, but got an empty array instead.", "messages[0].content",
         "empty_array"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
         "Invalid content type. image_url is only supported by certain models.",
         "messages[0].content[0].type", None),
        ([{"role": "user", "content": [{"type": "text"}]}],
         "Missing required parameter: 'messages[0].content[0].text'.",
         "messages[0].content[0].text", "missing_required_parameter"),
        ([{"role": "system", "content": [{"type": "image_url"}]}],
         "Invalid value: 'image_url'. Supported value is: 'text'.", "messages[0].content[0].type",
         "invalid_value"),
        ([{**USER, "name": "a b"}], "Invalid 'messages[0].name': string does not match pattern. "
         "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'.", "messages[0].name",
         "invalid_value"),
        ([USER, {"role": "assistant"}],
         "Invalid value for 'content': expected a string, got null.", "messages[1].content", None),
        ([USER, {"role": "assistant", "content": "x", "tool_calls": []}],
         "Invalid 'messages[1].tool_calls': empty array. Expected an array with minimum length 1, "
         "but got an empty array instead.", "messages[1].tool_calls", "empty_array"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}],
         "Missing required parameter: 'messages[1].tool_calls[0].function'.",
         "messages[1].tool_calls[0].function", "missing_required_parameter"),
        ([USER, ANSWER], ORPHAN, "messages.[1].role", None),
        ([USER, CALLS, ANSWER, ANSWER], ORPHAN, "messages.[3].role", None),
        ([USER, CALLS, ANSWER], UNANSWERED + "b", "messages.[1].role", None),
        ([USER, CALLS, USER], UNANSWERED + "a, b", "messages.[1].role", None),
        ([USER, {"role": "function", "content": "x"}],
         "Missing required parameter: 'messages[1].name'.", "messages[1].name",
         "missing_required_parameter"),
    ],
)  # fmt: skip
def test_refused(messages: list[Any], message: str, param: str, code: str | None) -> None:
    with pytest.raises(ParameterError) as error:
        parse(*messages)
    assert (error.value.message, error.value.param, error.value.code) == (message, param, code)


@pytest.mark.parametrize("value", ["x", 1, None, [], {}, [1], {"a": 1}, [[]]])
@pytest.mark.parametrize("key", ["role", "content", "name", "tool_calls", "function_call",
                                 "tool_call_id", "refusal"])  # fmt: skip
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "function"])
def test_any_value_is_taken_or_refused(role: str, key: str, value: object) -> None:
    message = {"role": role, "content": "x", key: value}
    try:
        parse(USER, message)
    except ParameterError as error:
        assert error.param
