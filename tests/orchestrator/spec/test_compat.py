"""What clients send beyond the parameters: renamed, dropped, or refused in the API's words."""

import copy
from typing import Any

import pytest

from orchestrator.errors import ParameterError
from orchestrator.spec.compat import checked, compatible, metadata_of
from orchestrator.spec.params import parse_params

BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def test_what_has_no_meaning_here_is_dropped_and_the_rest_stays() -> None:
    extra = {
        "ignore_eos": True,
        "metadata": {"a": "b"},
        "min_tokens": 3,
        "skip_special_tokens": False,
        "store": True,
    }
    given = {
        **BODY,
        **extra,
        "max_completion_tokens": 5,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    before = copy.deepcopy(given)
    made = compatible(given)
    assert given == before
    assert made == {**BODY, "max_tokens": 5, "stream_options": {"include_usage": True}}
    params = parse_params(made)
    assert (params.max_tokens, params.include_usage) == (5, True)


def test_developer_is_system_and_other_roles_are_themselves() -> None:
    roles = ["developer", "system", "user", "assistant"]
    messages = [{"role": role, "content": role} for role in roles]
    made = compatible({**BODY, "messages": messages})
    assert made["messages"] == [{"role": "system", "content": "developer"}, *messages[1:]]


@pytest.mark.parametrize("other", [None, 5])
def test_a_limit_that_is_null_is_none(other: int | None) -> None:
    made = compatible({**BODY, "max_completion_tokens": None, "max_tokens": other})
    assert made == {**BODY, "max_tokens": other}
    assert compatible({**BODY, "max_tokens": None, "max_completion_tokens": 5})["max_tokens"] == 5


@pytest.mark.parametrize(
    ("value", "code"),
    [("5", "invalid_type"), (True, "invalid_type"), (0, "integer_below_min_value")],
)
def test_a_limit_is_refused_by_the_name_it_was_given(value: object, code: str) -> None:
    with pytest.raises(ParameterError) as refused:
        compatible({**BODY, "max_completion_tokens": value})
    assert (refused.value.param, refused.value.code) == ("max_completion_tokens", code)


def test_both_limits_are_refused() -> None:
    with pytest.raises(ParameterError, match="at the same time") as refused:
        compatible({**BODY, "max_completion_tokens": 5, "max_tokens": 5})
    assert refused.value.param == "max_completion_tokens"


@pytest.mark.parametrize(
    "wrong",
    [{"messages": "hi"}, {"messages": ["hi", None]}, {"stream_options": 3}, {"reasoning": 1}],
)
def test_whatever_else_is_wrong_is_left_for_the_door(wrong: dict[str, object]) -> None:
    given = BODY | wrong
    assert compatible(given) == given
    with pytest.raises(ParameterError):
        parse_params(compatible(given))


@pytest.mark.parametrize(
    ("metadata", "param", "code"),
    [
        ([], "metadata", "invalid_type"),
        ({"a": 1}, "metadata.a", "invalid_type"),
        ({str(n): "" for n in range(17)}, "metadata", "object_above_max_properties"),
        ({"k" * 65: ""}, None, "string_above_max_length"),
        ({"a": "v" * 513}, "metadata.a", "string_above_max_length"),
        ({"a": "\0"}, "metadata.a", "invalid_value"),
    ],
)
def test_metadata_is_checked_before_it_is_left_out(
    metadata: object, param: str | None, code: str
) -> None:
    with pytest.raises(ParameterError) as refused:
        compatible({**BODY, "metadata": metadata})
    assert refused.value.code == code
    assert param is None or refused.value.param == param


def test_metadata_is_given_as_it_was_or_is_none() -> None:
    words = {str(n): "v" * 512 for n in range(15)} | {"k" * 64: ""}
    assert metadata_of({**BODY, "metadata": words}) == words
    assert metadata_of(BODY) is metadata_of({**BODY, "metadata": None}) is None


@pytest.mark.parametrize(
    ("beside", "param"),
    [
        ({}, "stream_options"),
        ({"tool_choice": "auto"}, "stream_options"),
        ({"response_format": {"type": "json_object"}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"n": 0}, "n"),
    ],
)
def test_stream_options_without_a_stream_are_refused_in_their_turn(
    beside: dict[str, object], param: str
) -> None:
    options = {"stream_options": {"include_usage": True}}
    with pytest.raises(ParameterError) as refused:
        checked({**BODY, **options, **beside}, max_choices=8)
    assert refused.value.param == param
