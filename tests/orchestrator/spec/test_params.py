"""The 23 parameters: the reference's texts, codes and order of refusals, and the defaults."""

import math
from typing import Any

import pytest

from orchestrator.errors import ParameterError
from orchestrator.spec.params import NAMES, NULLABLE, ChatParams, parse_params

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def parse(**given: Any) -> ChatParams:
    return parse_params({"messages": MESSAGES, "model": "tiny", **given})


def refused(raw: dict[str, Any], **options: Any) -> ParameterError:
    with pytest.raises(ParameterError) as error:
        parse_params(raw, **options)
    assert error.value.expected
    assert error.value.got
    assert error.value.to_json()["type"] == "invalid_request_error"
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
    ({"tools": [TOOL], "functions": [{"name": "f"}]},
     "'functions' is not allowed when 'tools' are specified.", "functions", None),
    ({"tools": [TOOL, TOOL]}, "Invalid 'tools': the name 'f' is used more than once.",
     "tools", None),
    ({"tools": [TOOL]}, "'tools' is not yet supported.", "tools", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, "'functions' is not yet supported.", "functions",
     "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "'response_format' is not yet supported.",
     "response_format", "unsupported_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}},
     "'response_format' is not yet supported.", "response_format", "unsupported_parameter"),
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


def test_the_first_row_of_the_reference_wins() -> None:
    """One failure per row of the table; repaired one by one, they appear in the table's order."""
    raw: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": "a b"}}], "tool_choice": "auto",
        "function_call": "auto", "top_logprobs": 3, "logit_bias": {"x": 1}, "stop": [],
        "temperature": 3, "service_tier": "x", "seed": "x", "model": "tiny", "zebra": 1,
    }  # fmt: skip
    repairs: list[tuple[str, dict[str, Any]]] = [
        ("unknown_parameter", {"zebra": None}),
        ("missing_required_parameter", {"messages": MESSAGES}),
        ("invalid_type", {"seed": 1}),
        ("invalid_value", {"service_tier": "auto"}),
        ("decimal_above_max_value", {"temperature": 1}),
        ("empty_array", {"stop": "x"}),
        ("invalid_value", {"tools": [TOOL]}),
        ("logit_bias", {"logit_bias": None}),
        ("top_logprobs", {"logprobs": True}),
        ("function_call", {"function_call": None}),
        ("unsupported_parameter", {"tools": None, "tool_choice": None}),
    ]
    for wanted, repair in repairs:
        error = refused(raw)
        assert (error.code or error.param) == wanted
        removed = {key for key, value in repair.items() if value is None}
        raw = {key: value for key, value in {**raw, **repair}.items() if key not in removed}
    assert parse_params(raw).seed == 1


@pytest.mark.parametrize("value", ["x", 1, 1.5, True, [], {}, None, [1], {"a": 1}, math.inf, [[]]])
@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_taken_or_refused(name: str, value: object) -> None:
    """No value of any kind makes the checks themselves fail."""
    try:
        parse(**{name: value})
    except ParameterError as error:
        assert error.message
        assert error.param
