"""Every form of message and tool that the API has, in the one form that templates know."""

from copy import deepcopy
from typing import Any

import pytest

from orchestrator.errors import RequestError
from workers.words.conversation import to_messages, to_tools

USER = {"role": "user", "content": "Hi"}
CALL = {"name": "f", "arguments": '{"x": [1, "é"]}'}
PARSED = {"name": "f", "arguments": {"x": [1, "é"]}}


def tool_call(id: str, function: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": function}


def test_text_parts_are_joined_without_a_separator() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    refusal = [{"type": "refusal", "refusal": "no"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": refusal}]
    given = deepcopy(messages)
    assert [message["content"] for message in to_messages(messages)] == ["a b", "no"]
    assert messages == given


@pytest.mark.parametrize("kind", ["image_url", "input_audio", None])
def test_a_part_that_is_no_text_is_refused(kind: str | None) -> None:
    content = [{"type": "text", "text": ""}, {"type": kind}]
    with pytest.raises(RequestError) as caught:
        to_messages([USER, {"role": "user", "content": content}])
    assert caught.value.code == "unsupported_content"
    assert caught.value.message == f"messages[1].content[1]: expected text, got {kind!r}"


def test_a_null_is_a_key_that_is_not_there_and_an_empty_text_stays() -> None:
    null = {"role": "assistant", "content": None, "tool_calls": None, "function_call": None}
    empty = {"role": "assistant", "content": "", "name": "n", "refusal": None}
    assert to_messages([null, empty]) == [
        {"role": "assistant"},
        {"role": "assistant", "content": "", "name": "n"},
    ]


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"b": 1.50, "a": [null]}', {"b": 1.5, "a": [None]}),
        ("", {}),
        ('{"a": 1', '{"a": 1'),
        ("[" * 100_000, "[" * 100_000),
        ({"a": 1}, {"a": 1}),
        (None, None),
    ],
    ids=["object", "none", "cut", "deep", "parsed", "null"],
)
def test_arguments_are_objects_and_broken_ones_stay_text(arguments: object, seen: object) -> None:
    call = tool_call("call_1", {"name": "f", "arguments": arguments})
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    given = deepcopy(messages)
    function = to_messages(messages)[0]["tool_calls"][0]["function"]
    assert function == {"name": "f", "arguments": seen}
    assert list(function) == ["name", "arguments"]
    assert messages == given


def test_function_calls_and_their_answers_are_tool_calls() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "function", "name": "f", "content": "42"},
        {"role": "function", "name": "g", "content": None},
        {"role": "assistant", "content": "and", "function_call": {**CALL, "name": "g"}},
        {"role": "function", "name": "g", "content": "43"},
    ]
    given = deepcopy(messages)
    assert to_messages(messages, short_ids=True) == [
        USER,
        {"role": "assistant", "tool_calls": [tool_call("call00001", PARSED)]},
        {"role": "tool", "name": "f", "content": "42", "tool_call_id": "call00001"},
        {"role": "tool", "name": "g", "content": "", "tool_call_id": "call00003"},
        {
            "role": "assistant",
            "content": "and",
            "tool_calls": [tool_call("call00004", {**PARSED, "name": "g"})],
        },
        {"role": "tool", "name": "g", "content": "43", "tool_call_id": "call00004"},
    ]
    assert messages == given


def test_short_ids_agree_on_both_sides_and_stay_apart() -> None:
    ids = ["call_" + "aB3" * 8, "call_" + "aB3" * 7 + "aB4", "exactly9X", "functions.f:0", "é", ""]
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [tool_call(id, CALL) for id in ids]}
    ]
    messages += [{"role": "tool", "tool_call_id": id, "content": "42"} for id in ids]
    asking, *answering = to_messages(messages, short_ids=True)
    asked = [call["id"] for call in asking["tool_calls"]]
    assert asked == [message["tool_call_id"] for message in answering]
    assert len(set(asked)) == len(ids)
    assert asked[2] == "exactly9X"
    assert all(len(id) == 9 and id.isascii() and id.isalnum() for id in asked)
    as_given = to_messages(messages)
    assert [call["id"] for call in as_given[0]["tool_calls"]] == ids
    assert [message["tool_call_id"] for message in as_given[1:]] == ids


def test_functions_are_tools_and_absent_parameters_take_none() -> None:
    none: dict[str, Any] = {"type": "object", "properties": {}}
    as_tool = {"type": "function", "function": {"name": "f", "description": "d", "strict": True}}
    function = {"name": "g", "parameters": {"type": "object", "required": []}}
    given = deepcopy([as_tool, function])
    assert to_tools([as_tool, function, {"name": "h", "parameters": None}]) == [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "strict": True, "parameters": none},
        },
        {"type": "function", "function": function},
        {"type": "function", "function": {"name": "h", "parameters": none}},
    ]
    assert [as_tool, function] == given
    assert to_tools([]) is to_tools(None) is None
