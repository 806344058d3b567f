"""The 23 parameters: the reference's texts, codes and order of refusals, and the defaults."""

import math
from typing import Any

import pytest

from orchestrator.errors import ParameterError
from orchestrator.spec.params import NAMES, NULLABLE, ChatParams, parse_body, parse_params

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def parse(**given: Any) -> ChatParams:
    return parse_params({"messages": MESSAGES, "model": "tiny", **given})


def refused(raw: dict[str, Any], **options: Any) -> ParameterError:
    with pytest.raises(ParameterError) as error:
        parse_params(raw, **options)
    assert error.value.expected
    assert error.value.got
    body = error.value.to_json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["type"] == "invalid_request_error"
    return error.value


def test_there_are_23() -> None:
    assert len(NAMES) == 23


def test_defaults() -> None:
    assert parse() == ChatParams(
        messages=({"role": "user", "content": "Hello"},), model="tiny", stream=True,
        frequency_penalty=0.0, presence_penalty=0.0, function_call=None, functions=None,
        logit_bias={}, logprobs=False, top_logprobs=None, max_tokens=None, n=1,
        parallel_tool_calls=True, response_format=None, seed=None, service_tier=None, stop=(),
        stream_options=None, temperature=1.0, top_p=1.0, tool_choice=None, tools=None, user=None,
    )  # fmt: skip


def test_given_values() -> None:
    given = parse(
        stream=True, frequency_penalty=-2, presence_penalty=2, logit_bias={"7": -100, "0": 0.5},
        logprobs=True, top_logprobs=20, max_tokens=1, n=128, seed=-(2**63), service_tier="auto",
        stop=["a", "b"], stream_options={"include_usage": True}, temperature=2, top_p=0,
        response_format={"type": "text"}, user="me",
    )  # fmt: skip
    assert given.logit_bias == {7: -100.0, 0: 0.5}
    assert given.stop == ("a", "b")
    assert parse(stop="a").stop == ("a",)
    assert (given.temperature, given.top_p, given.seed) == (2.0, 0.0, -(2**63))
    assert isinstance(given.temperature, float)
    assert given.include_usage
    assert not parse().include_usage


@pytest.mark.parametrize("name", sorted(NULLABLE))
def test_null_is_not_given(name: str) -> None:
    assert parse(**{name: None}) == parse()


@pytest.mark.parametrize("name", sorted(set(NAMES) - NULLABLE))
def test_null_is_a_wrong_type_elsewhere(name: str) -> None:
    error = refused({"messages": MESSAGES, "model": "tiny", name: None})
    assert error.code == "invalid_type"
    assert "but got null instead." in error.message


CASES: list[tuple[dict[str, Any], str, str | None, str | None]] = [
    ({"x": 1}, "Unknown parameter: 'x'.", "x", "unknown_parameter"),
    ({"parallel_tool_calls": None},
     "Invalid type for 'parallel_tool_calls': expected a boolean, but got null instead.",
     "parallel_tool_calls", "invalid_type"),
    ({"temperature": "hot"},
     "Invalid type for 'temperature': expected a decimal, but got a string instead.",
     "temperature", "invalid_type"),
    ({"temperature": True},
     "Invalid type for 'temperature': expected a decimal, but got a boolean instead.",
     "temperature", "invalid_type"),
    ({"max_tokens": 1.0},
     "Invalid type for 'max_tokens': expected an integer, but got a decimal instead.",
     "max_tokens", "invalid_type"),
    ({"temperature": math.nan},
     "Invalid type for 'temperature': expected a decimal, "
     "but got a number that is not finite instead.", "temperature", "invalid_type"),
    ({"temperature": 200},
     "Invalid 'temperature': decimal above maximum value. "
     "Expected a value <= 2, but got 200 instead.", "temperature", "decimal_above_max_value"),
    ({"top_p": -0.5},
     "Invalid 'top_p': decimal below minimum value. "
     "Expected a value >= 0, but got -0.5 instead.", "top_p", "decimal_below_min_value"),
    ({"n": 129},
     "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 129 instead.",
     "n", "integer_above_max_value"),
    ({"max_tokens": 0},
     "Invalid 'max_tokens': integer below minimum value. "
     "Expected a value >= 1, but got 0 instead.", "max_tokens", "integer_below_min_value"),
    ({"seed": 2**63},
     "Invalid 'seed': integer above maximum value. Expected a value <= 9223372036854775807, "
     "but got 9223372036854775808 instead.", "seed", "integer_above_max_value"),
    ({"service_tier": "x"}, "Invalid value: 'x'. Supported values are: 'auto' and 'default'.",
     "service_tier", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": "x"},
     "Invalid value: 'x'. Supported values are: 'none', 'auto', and 'required'.",
     "tool_choice", "invalid_value"),
    ({"stream": False}, "Invalid value: 'false'. Supported value is: 'true'.",
     "stream", "invalid_value"),
    ({"stop": list("abcde")},
     "Invalid 'stop': array too long. Expected an array with maximum length 4, "
     "but got an array with length 5 instead.", "stop", "array_above_max_length"),
    ({"stop": []},
     "Invalid 'stop': empty array. Expected an array with minimum length 1, "
     "but got an empty array instead.", "stop", "empty_array"),
    ({"messages": []},
     "Invalid 'messages': empty array. Expected an array with minimum length 1, "
     "but got an empty array instead.", "messages", "empty_array"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
     "Invalid 'tools[0].function.name': string does not match pattern. "
     "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'.",
     "tools[0].function.name", "invalid_value"),
    ({"logit_bias": {"x": 1}},
     "Invalid key in 'logit_bias': x. You should only be submitting non-negative integers.",
     "logit_bias", None),
    ({"logit_bias": {"-1": 1}},
     "Invalid key in 'logit_bias': -1. You should only be submitting non-negative integers.",
     "logit_bias", None),
    ({"top_logprobs": 5},
     "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
     "top_logprobs", None),
    ({"top_logprobs": 0, "logprobs": False},
     "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
     "top_logprobs", None),
    ({"tool_choice": "auto"},
     "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
     "tool_choice", None),
    ({"parallel_tool_calls": True},
     "Invalid value for 'parallel_tool_calls': "
     "'parallel_tool_calls' is only allowed when 'tools' are specified.",
     "parallel_tool_calls", None),
    ({"function_call": "none"},
     "Invalid value for 'function_call': "
     "'function_call' is only allowed when 'functions' are specified.", "function_call", None),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "Invalid value for 'tool_choice': 'g' is not one of the provided tools.",
     "tool_choice", None),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}},
     "Invalid value for 'function_call': 'g' is not one of the provided functions.",
     "function_call", None),
    ({"tools": [TOOL], "functions": [{"name": "f"}], "function_call": {"name": "g"}},
     "Invalid value for 'function_call': 'g' is not one of the provided functions.",
     "function_call", None),
    ({"tools": [TOOL], "functions": [{"name": "f"}]},
     "'functions' is not allowed when 'tools' are specified.", "functions", None),
    ({"tools": [TOOL, TOOL]}, "Invalid 'tools': the name 'f' is used more than once.",
     "tools", None),
    ({"functions": [{"name": "f"}, {"name": "f"}]},
     "Invalid 'functions': the name 'f' is used more than once.", "functions", None),
    ({"functions": [{"name": "f"}], "function_call": "required"},
     "Invalid value: 'required'. Supported values are: 'none' and 'auto'.",
     "function_call", "invalid_value"),
    ({"functions": [{"name": "f", "strict": True}]}, "Unknown parameter: 'functions[0].strict'.",
     "functions[0].strict", "unknown_parameter"),
    ({"tools": [TOOL] * 129},
     "Invalid 'tools': array too long. Expected an array with maximum length 128, "
     "but got an array with length 129 instead.", "tools", "array_above_max_length"),
    ({"functions": []},
     "Invalid 'functions': empty array. Expected an array with minimum length 1, "
     "but got an empty array instead.", "functions", "empty_array"),
    ({"tools": [{"type": "function", "function": {"name": "f" * 65}}]},
     "Invalid 'tools[0].function.name': string too long. Expected a string with maximum "
     "length 64, but got a string with length 65 instead.",
     "tools[0].function.name", "string_above_max_length"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]},
     "Invalid 'tools[0].function.name': empty string. Expected a string with minimum length 1, "
     "but got an empty string instead.", "tools[0].function.name", "empty_string"),
    ({"stop": ["a", ""]},
     "Invalid 'stop[1]': empty string. Expected a string with minimum length 1, "
     "but got an empty string instead.", "stop[1]", "empty_string"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]},
     "Invalid type for 'tools[0].function.strict': expected a boolean, "
     "but got an integer instead.", "tools[0].function.strict", "invalid_type"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
     "Invalid type for 'tools[0].function.parameters': expected an object, "
     "but got an array instead.", "tools[0].function.parameters", "invalid_type"),
    ({"tools": [{"type": "code"}]}, "Missing required parameter: 'tools[0].function'.",
     "tools[0].function", "missing_required_parameter"),
    ({"tools": [{"type": "code", "function": {"name": "f"}}]},
     "Invalid value: 'code'. Supported value is: 'function'.", "tools[0].type", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {}}},
     "Missing required parameter: 'tool_choice.function.name'.", "tool_choice.function.name",
     "missing_required_parameter"),
    ({"response_format": {"type": "json_object"}},
     "'messages' must contain the word 'json' in some form, to use 'response_format' of type "
     "'json_object'.", "messages", None),
    ({"response_format": {"type": "json_schema"}},
     "Missing required parameter: 'response_format.json_schema'.",
     "response_format.json_schema", "missing_required_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
     "Missing required parameter: 'response_format.json_schema.name'.",
     "response_format.json_schema.name", "missing_required_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
     "Invalid 'response_format.json_schema.name': string does not match pattern. "
     "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'.",
     "response_format.json_schema.name", "invalid_value"),
    ({"response_format": {"type": "text", "json_schema": {"name": "s"}}},
     "Unknown parameter: 'response_format.json_schema'.", "response_format.json_schema",
     "unknown_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "s", "schema": {"type": "object"}, "strict": True}}},
     "Invalid schema for response_format 's': In context=(), 'additionalProperties' is required "
     "to be supplied and to be false.", "response_format", None),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "s", "schema": {"type": "strin"}}}},
     "Invalid schema for response_format 's': 'strin' is not valid under any of the given "
     "schemas.", "response_format", None),
    ({"tools": [TOOL, {"type": "function", "function": {
        "name": "g", "parameters": {"type": "object"}, "strict": True}}]},
     "Invalid schema for function 'g': In context=(), 'additionalProperties' is required "
     "to be supplied and to be false.", "tools[1].function.parameters",
     "invalid_function_parameters"),
    ({"functions": [{"name": "f", "parameters": {"type": "string"}}]},
     "Invalid schema for function 'f': schema must be a JSON Schema of 'type: \"object\"', "
     "got 'type: \"string\"'.", "functions[0].parameters", "invalid_function_parameters"),
    ({"response_format": {"type": "xml"}},
     "Invalid value: 'xml'. Supported values are: 'text', 'json_object', and 'json_schema'.",
     "response_format.type", "invalid_value"),
    ({"stream_options": {"continuous_usage_stats": True}},
     "Unknown parameter: 'stream_options.continuous_usage_stats'.",
     "stream_options.continuous_usage_stats", "unknown_parameter"),
    ({"stream_options": {"include_usage": 1}},
     "Invalid type for 'stream_options.include_usage': expected a boolean, "
     "but got an integer instead.", "stream_options.include_usage", "invalid_type"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message", "param", "code"), CASES)
def test_refusals(given: dict[str, Any], message: str, param: str | None, code: str | None) -> None:
    error = refused({"messages": MESSAGES, "model": "tiny", **given})
    assert (error.message, error.param, error.code) == (message, param, code)


def test_missing() -> None:
    error = refused({"model": "tiny"})
    assert (error.message, error.param, error.code) == (
        "Missing required parameter: 'messages'.", "messages", "missing_required_parameter",
    )  # fmt: skip
    assert refused({"messages": MESSAGES}).param == "model"


def test_vocabulary_bounds_logit_bias() -> None:
    raw = {"messages": MESSAGES, "model": "tiny", "logit_bias": {"100265": 1}}
    error = refused(raw, vocab_size=100258)
    assert error.message == "Invalid key in 'logit_bias': 100265. Maximum value is 100257."
    assert parse_params(raw, vocab_size=100266).logit_bias == {100265: 1.0}


ABSENT = object()
NAMELESS = {"type": "function", "function": {"name": "a b"}}
OPEN_CALL = {"role": "assistant", "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip
LOOSE = {"type": "object"}
ROWS: list[dict[str, Any]] = [  # one failure for each row of the reference's table, in its order
    {"zebra": 1},
    {"messages": ABSENT},
    {"seed": "x"},
    {"service_tier": "x"},
    {"temperature": 3},
    {"stop": []},
    {"tools": [NAMELESS]},
    {"logit_bias": {"x": 1}},
    {"top_logprobs": 3},
    {"tool_choice": "auto"},
    {"parallel_tool_calls": True},
    {"function_call": "auto"},
    {"functions": [{"name": "f"}], "function_call": {"name": "g"}},
    {"tools": [TOOL], "functions": [{"name": "f"}]},
    {"messages": [*MESSAGES, OPEN_CALL]},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {
        "name": "s", "schema": LOOSE, "strict": True}}},
    {"tools": [{"type": "function", "function": {
        "name": "f", "parameters": LOOSE, "strict": True}}]},
]  # fmt: skip


def with_given(given: dict[str, Any]) -> dict[str, Any]:
    raw = {"messages": MESSAGES, "model": "tiny", **given}
    return {key: value for key, value in raw.items() if value is not ABSENT}


def test_the_first_row_of_the_reference_wins() -> None:
    """Of any two rows that fail together, the upper one is told."""
    alone = [refused(with_given(given)).message for given in ROWS]
    assert len(set(alone)) == len(ROWS)
    pairs = 0
    for lower, given in enumerate(ROWS):
        for upper, before in enumerate(ROWS[:lower]):
            cured = any(
                {"tools", "functions"} & one.keys() and choice in other
                for one, other in ((given, before), (before, given))
                for choice in ("tool_choice", "parallel_tool_calls", "function_call")
            )
            if given.keys() & before.keys() or cured:
                continue
            assert refused(with_given({**given, **before})).message == alone[upper]
            pairs += 1
    assert pairs > 100


def test_what_asks_for_calls_or_json_is_taken() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    strict = {"name": "f", "description": "d", "parameters": schema, "strict": True}
    tools = [{"type": "function", "function": strict}, {**TOOL, "function": {"name": "g"}}]
    named = {"type": "function", "function": {"name": "g"}}
    for choice in ("none", "auto", "required", named):
        given = parse(tools=tools, tool_choice=choice, parallel_tool_calls=False)
        assert (given.tools, given.tool_choice) == (tools, choice)
        assert given.parallel_tool_calls is False
    functions = [{"name": "f", "description": "d", "parameters": {}}]
    for call in ("none", "auto", {"name": "f"}):
        given = parse(functions=functions, function_call=call)
        assert (given.functions, given.function_call) == (functions, call)
    for inner in (
        {"name": "s"},
        {"name": "s", "description": "d", "schema": schema, "strict": True},
        {"name": "s", "schema": {"type": "array", "uniqueItems": True}, "strict": None},
    ):
        shape = {"type": "json_schema", "json_schema": inner}
        assert parse(response_format=shape, tools=tools).response_format == shape


@pytest.mark.parametrize("content", ["as JSON", [{"type": "text", "text": "a Json"}]])
@pytest.mark.parametrize("role", ["system", "user"])
def test_json_object_wants_its_word_in_any_message(role: str, content: object) -> None:
    raw = {"messages": [*MESSAGES, {"role": role, "content": content}], "model": "tiny",
           "response_format": {"type": "json_object"}}  # fmt: skip
    assert parse_params(raw).response_format == {"type": "json_object"}


def test_json_object_wants_its_word_only_where_the_words_are_final() -> None:
    raw = {"messages": MESSAGES, "model": "tiny", "response_format": {"type": "json_object"}}
    assert parse_params(raw, rendered=False).response_format == {"type": "json_object"}
    refused(raw)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b"null", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}',
     b'{"a": "\\ud800"}', b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ParameterError) as error:
        parse_body(body)
    message = "We could not parse the JSON body of your request."
    assert error.value.to_json() == {"error": {
        "message": message, "type": "invalid_request_error", "param": None, "code": None,
    }}  # fmt: skip
    assert error.value.at("line 3").expected == error.value.expected != ""


def test_a_body_is_what_its_json_says() -> None:
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "\\u00e9😀"}], "top_p": 1}'
    assert parse_params(parse_body(body)) == parse_params(parse_body(body.encode()))
    assert parse_params(parse_body(body)).messages[0]["content"] == "é😀"


@pytest.mark.parametrize("value", ["x", 1, 1.5, True, [], {}, None, [1], {"a": 1}, math.inf, [[]]])
@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_taken_or_refused(name: str, value: object) -> None:
    """No value of any kind makes the checks themselves fail."""
    try:
        parse(**{name: value})
    except ParameterError as error:
        assert error.message
        assert error.param
