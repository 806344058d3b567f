"""What a request asks of its completions' form: the tools shown, the grammar, how a call ends.

Knows the parameters `tools`, `functions`, their choices and `response_format`; nothing of how a
grammar is made, of jobs or of SQL.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ParameterError
from orchestrator.spec.params import ChatParams
from orchestrator.spec.refusals import Rank, Refusal
from workers.grammars.constraint import Function, Grammar, GrammarError, Shape
from workers.loading.wording import Wording
from workers.words.calls import CallFormat

FREE = Shape()
_PLACE = re.compile(r"tools\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request's wishes; `tools` as the template shows them, None for none.

    `call_reason` is the finish reason of a choice that makes a call. `named` are the functions'
    names in the order given, `old` whether they came as `functions`; `schema_name` is that of
    the `response_format`.
    """

    shape: Shape
    tools: list[dict[str, Any]] | None = None
    call_reason: str = "tool_calls"
    named: tuple[str, ...] = ()
    old: bool = False
    schema_name: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """The same for one model: what its completions are held to, and what is not kept to."""

    grammar: Grammar | None = None
    calls: CallFormat | None = None
    warnings: tuple[str, ...] = ()


def asked(params: ChatParams) -> Asked:
    """What `params` ask for. Without a tool that may be called the template shows none."""
    schema, strict = _response(params.response_format)
    tools: tuple[Mapping[str, Any], ...] = params.tools or ()
    old: tuple[Mapping[str, Any], ...] = params.functions or ()
    given = [tool["function"] for tool in tools] or list(old)
    choice = params.tool_choice if params.tools else params.function_call
    schema_name = _schema_name(params.response_format)
    if not given or choice == "none":
        return Asked(Shape(schema=schema, strict=strict), schema_name=schema_name)
    named = _named(choice)
    functions = tuple(_function(f) for f in given if named in (None, f["name"]))
    shape = Shape(
        schema=schema,
        strict=strict,
        functions=functions,
        choice="named" if named else "required" if choice == "required" else "auto",
        parallel=bool(params.tools) and params.parallel_tool_calls and not named,
    )
    called = "tool_calls" if params.tools else "function_call"
    return Asked(
        shape,
        tools=[{"type": "function", "function": dict(function)} for function in given],
        call_reason="stop" if named else called,
        named=tuple(function["name"] for function in given),
        old=not params.tools,
        schema_name=schema_name,
    )


def form(wishes: Asked, wording: Wording) -> Form:
    """What the model's completions are held to.

    Raises ParameterError where the model cannot keep to it: tools without a known format of
    calls, or a strict schema that cannot be enforced.
    """
    if wishes.shape == FREE:
        return Form()
    if wishes.shape.functions and wording.calls is None:
        raise _no_calls(wishes)
    try:
        compiled = wording.grammars.compile(wishes.shape, wording.calls)
    except GrammarError as error:
        raise _not_compiled(wishes, error) from error
    return Form(compiled.grammar, compiled.calls, compiled.warnings)


def _response(asked_for: Mapping[str, Any] | None) -> tuple[Mapping[str, Any] | None, bool]:
    """Schema and strictness of `response_format`; no schema for plain text."""
    kind = (asked_for or {}).get("type", "text")
    if asked_for is None or kind == "text":
        return None, False
    wanted = asked_for.get("json_schema") or {}
    schema = wanted.get("schema")
    return ({"type": "object"} if schema is None else schema), bool(wanted.get("strict"))


def _schema_name(asked_for: Mapping[str, Any] | None) -> str:
    return str(((asked_for or {}).get("json_schema") or {}).get("name", ""))


def _function(given: Mapping[str, Any]) -> Function:
    return Function(given["name"], given.get("parameters"), bool(given.get("strict")))


def _named(choice: str | Mapping[str, Any] | None) -> str | None:
    """The one function that must be called: of `tool_choice` or of `function_call`."""
    if choice is None or isinstance(choice, str):
        return None
    name: str = choice.get("function", choice)["name"]
    return name


def _no_calls(wishes: Asked) -> ParameterError:
    param = "functions" if wishes.old else "tools"
    text = f"'{param}' cannot be used with this model: no format of its calls is known."
    plain = f"no '{param}' with a model whose format of calls is not known"
    got = f"{len(wishes.named)} of them"
    return Refusal(Rank.FUNCTION_SCHEMA, text, param, None, plain, got).error()


def _not_compiled(wishes: Asked, error: GrammarError) -> ParameterError:
    plain, got = "a schema that can be enforced", error.reason
    if error.where == "response_format":
        text = f"Invalid schema for response_format '{wishes.schema_name}': {got}"
        path = ("response_format", "json_schema", "schema")
        return Refusal(Rank.SCHEMA, text, "response_format", None, plain, got, path).error()
    text, param = f"Invalid schemas of functions: {got}", "functions" if wishes.old else "tools"
    if found := _PLACE.match(error.where):
        name = wishes.shape.functions[int(found[1])].name
        text = f"Invalid schema for function '{name}': {got}"
        within = "parameters" if wishes.old else "function.parameters"
        param = f"{param}[{wishes.named.index(name)}].{within}"
    code = "invalid_function_parameters"
    return Refusal(Rank.FUNCTION_SCHEMA, text, param, code, plain, got).error()
