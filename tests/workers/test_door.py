"""Plans against a model's files: token ids in range, prompts that fit, refused with their place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ParameterError, SpecError
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import Plan, plan
from workers.door import check_plan
from workers.folders.folder import TINY
from workers.loading.wording import Wording

JOB = """
name: door
model: tiny
dataset:
  items: [{q: short}, {q: "a much longer question that needs many more tokens than the other"}]
params:
  messages: [{role: user, content: "{{ q }}"}]
"""


@pytest.fixture(scope="module")
def wording() -> Wording:
    return Wording.load(TINY)


def planned(more: str) -> Plan:
    return plan(parse_job(JOB + more, file="x.yaml", root=Path.cwd()))


def prompt_length(text: str, wording: Wording, tools: list[dict[str, Any]] | None = None) -> int:
    rendered = wording.template.render([{"role": "user", "content": text}], tools)
    return len(wording.tokenizer.encode(rendered))


def test_a_prompt_that_just_fits_passes_and_one_token_less_is_refused(wording: Wording) -> None:
    made = planned("  max_tokens: 7\n")
    longest = max(prompt_length(str(item.columns["q"]), wording) for item in made.items())
    check_plan(made, wording, context=longest + 7)
    with pytest.raises(ParameterError) as refused:
        check_plan(made, wording, context=longest + 6)
    assert refused.value.code == "context_length_exceeded"
    assert str(refused.value) == (
        "x.yaml:7: params.messages: item 1 (custom_id '1'): This model's maximum context length is "
        f"{longest + 6} tokens. However, you requested {longest + 7} tokens ({longest} in the "
        "messages, 7 in the completion). Please reduce the length of the messages or completion."
    )


def test_the_largest_max_tokens_of_the_sweep_counts_for_every_prompt_of_it(
    wording: Wording,
) -> None:
    made = planned("sweep: {max_tokens: [3, 900, 5]}\n")
    check_plan(made, wording, context=1024)
    with pytest.raises(ParameterError, match="900 in the completion"):
        check_plan(made, wording, context=905)


def test_a_token_id_beyond_the_vocabulary_is_refused_with_the_largest(wording: Wording) -> None:
    largest = wording.tokenizer.vocab_size - 1
    check_plan(planned(f"  logit_bias: {{{largest}: 1}}\n"), wording, context=1024)
    with pytest.raises(ParameterError, match=rf"{largest + 1}\. Maximum value is {largest}\.$"):
        check_plan(
            planned(f"sweep: {{logit_bias: [{{1: 1}}, {{{largest + 1}: 1}}]}}\n"),
            wording,
            context=1024,
        )


def test_a_prompt_without_room_for_one_token_is_refused_without_max_tokens(
    wording: Wording,
) -> None:
    made = planned("")
    longest = max(prompt_length(str(item.columns["q"]), wording) for item in made.items())
    check_plan(made, wording, context=longest + 1)
    with pytest.raises(ParameterError, match="maximum context length"):
        check_plan(made, wording, context=longest)


TOOLS = """  tools:
    - type: function
      function: {name: g}
    - type: function
      function:
        name: f
        strict: true
        parameters:
          type: object
          properties: {a: {type: string, pattern: "(?=x)"}}
          required: [a]
          additionalProperties: false
"""


def refused(made: Plan, wording: Wording) -> SpecError:
    with pytest.raises(SpecError) as error:
        check_plan(made, wording, context=1024)
    return error.value


def test_a_strict_function_that_cannot_be_enforced_is_refused_with_its_place(
    wording: Wording,
) -> None:
    error = refused(planned(TOOLS), wording)
    assert error.where == "x.yaml:15: params.tools[1].function.parameters"
    assert error.expected == "a schema that can be enforced" and "look" in error.got
    named = "  tool_choice: {type: function, function: {name: f}}\n"
    assert refused(planned(TOOLS + named), wording).where == error.where
    check_plan(planned(TOOLS + "  tool_choice: none\n"), wording, context=1024)
    check_plan(planned(TOOLS.replace("strict: true", "strict: false")), wording, context=1024)
    swept = planned(TOOLS + "sweep: {tool_choice: [none, auto]}\n")
    assert refused(swept, wording).where == error.where


def test_a_strict_response_format_that_cannot_be_enforced_is_refused_at_its_point(
    wording: Wording,
) -> None:
    good, bad = "{type: string}", '{type: string, pattern: "(?=x)"}'
    formats = ", ".join(
        "{type: json_schema, json_schema: {name: x, strict: true, schema: {type: object, "
        f"properties: {{a: {a}}}, required: [a], additionalProperties: false}}}}}}"
        for a in (good, bad)
    )
    error = refused(planned(f"sweep: {{response_format: [{formats}]}}\n"), wording)
    assert error.where == "x.yaml:8: sweep.response_format[1].json_schema.schema"


def test_tools_without_a_known_form_of_calls_are_refused(wording: Wording) -> None:
    error = refused(planned(TOOLS), replace(wording, calls=None))
    assert error.where == "x.yaml:8: params.tools"
    old = "  functions: [{name: f}]\n"
    error = refused(planned(old), replace(wording, calls=None))
    assert str(error) == (
        "x.yaml:8: params.functions: expected no 'functions' with a model whose format of calls "
        "is not known, got 1 of them"
    )
    check_plan(planned(old), wording, context=1024)


def test_the_tools_count_in_the_prompt_where_they_are_shown(wording: Wording) -> None:
    tools = "  tools: [{type: function, function: {name: get_weather}}]\n"
    given = [{"type": "function", "function": {"name": "get_weather"}}]
    text = "a much longer question that needs many more tokens than the other"
    plain, shown = prompt_length(text, wording), prompt_length(text, wording, given)
    assert shown > plain
    swept = planned(tools + "sweep: {tool_choice: [none, auto]}\n")
    check_plan(swept, wording, context=shown + 1)
    with pytest.raises(ParameterError, match="maximum context length"):
        check_plan(swept, wording, context=shown)
    check_plan(planned(tools + "  tool_choice: none\n"), wording, context=plain + 1)
