"""Tools, functions and response formats: their shape.

Checks what the reference's sections 1.1, 5 and 6 say of the shape and of what may stand with
what; a schema inside is checked by `schemas`. Knows nothing of grammars.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from orchestrator.spec import refusals, schemas
from orchestrator.spec.refusals import Rank, Refusal

MAX_TOOLS = 128
_CHOICES = ("none", "auto", "required")
_FORMATS = ("text", "json_object", "json_schema")


def check(raw: Mapping[str, object]) -> Iterator[Refusal]:
    """Every refusal of tools, functions, their choices, and response_format."""
    if "tools" in raw:
        yield from _tools(raw["tools"])
    if "functions" in raw:
        yield from _functions(raw["functions"])
    yield from _choice(raw, "tool_choice", "tools", _CHOICES)
    yield from _choice(raw, "function_call", "functions", _CHOICES[:2])
    if "parallel_tool_calls" in raw and "tools" not in raw:
        yield _only_with("parallel_tool_calls", "tools", Rank.PARALLEL)
    if "tools" in raw and "functions" in raw:
        text = "'functions' is not allowed when 'tools' are specified."
        yield Refusal(
            Rank.TOGETHER, text, "functions", None, "no 'functions' beside 'tools'", "both"
        )
    if "response_format" in raw:
        yield from _response_format(raw["response_format"])


def _only_with(path: str, other: str, rank: Rank) -> Refusal:
    text = f"Invalid value for '{path}': '{path}' is only allowed when '{other}' are specified."
    return Refusal(
        rank, text, path, None, f"'{path}' only together with '{other}'", f"no '{other}'"
    )


def _tools(value: object) -> Iterator[Refusal]:
    if not isinstance(value, list | tuple):
        yield refusals.wrong_type("tools", "an array of objects", value)
        return
    yield from _length("tools", len(value))
    for position, tool in enumerate(value):
        yield from _tool(f"tools[{position}]", tool)
    yield from _duplicates("tools", _tool_names(value))


def _tool(path: str, tool: object) -> Iterator[Refusal]:
    if not isinstance(tool, Mapping):
        yield refusals.wrong_type(path, "an object", tool)
        return
    yield from refusals.keys(tool, path, ("type", "function"), ("type", "function"))
    if tool.get("type", "function") != "function":
        yield refusals.wrong_value(f"{path}.type", ("function",), tool["type"])
    if "function" in tool:
        allowed = ("name", "description", "parameters", "strict")
        yield from _function(f"{path}.function", tool["function"], allowed)


def _functions(value: object) -> Iterator[Refusal]:
    if not isinstance(value, list | tuple):
        yield refusals.wrong_type("functions", "an array of objects", value)
        return
    yield from _length("functions", len(value))
    for position, function in enumerate(value):
        yield from _function(
            f"functions[{position}]", function, ("name", "description", "parameters")
        )
    yield from _duplicates("functions", _function_names(value))


def _function(path: str, function: object, allowed: tuple[str, ...]) -> Iterator[Refusal]:
    if not isinstance(function, Mapping):
        yield refusals.wrong_type(path, "an object", function)
        return
    yield from refusals.keys(function, path, allowed, ("name",))
    if "name" in function:
        yield from refusals.name(f"{path}.name", function["name"])
    if "description" in function:
        yield from refusals.string(f"{path}.description", function["description"])
    if function.get("strict") is not None:
        yield from refusals.boolean(f"{path}.strict", function["strict"])
    if "parameters" in function:
        yield from _parameters(f"{path}.parameters", function)


def _parameters(path: str, function: Mapping[str, object]) -> Iterator[Refusal]:
    schema = function["parameters"]
    if not isinstance(schema, Mapping):
        yield refusals.wrong_type(path, "an object", schema)
    elif fault := schemas.fault(schema, strict=function.get("strict") is True, arguments=True):
        text = f"Invalid schema for function '{function.get('name')}': {fault.reason}"
        place = (*refusals.path_of(path), *fault.path)
        yield Refusal(
            Rank.FUNCTION_SCHEMA, text, path, "invalid_function_parameters",
            fault.expected, fault.got, place,
        )  # fmt: skip


def _length(path: str, length: int) -> Iterator[Refusal]:
    if length == 0:
        yield refusals.empty(path)
    if length > MAX_TOOLS:
        yield refusals.too_long(path, MAX_TOOLS, length)


def _tool_names(value: object) -> list[object]:
    tools = value if isinstance(value, list | tuple) else ()
    return _function_names([tool.get("function") for tool in tools if isinstance(tool, Mapping)])


def _function_names(value: object) -> list[object]:
    functions = value if isinstance(value, list | tuple) else ()
    return [function.get("name") for function in functions if isinstance(function, Mapping)]


def _duplicates(path: str, found: list[object]) -> Iterator[Refusal]:
    for name, other in pairwise(sorted(name for name in found if isinstance(name, str))):
        if name == other:
            text = f"Invalid '{path}': the name '{name}' is used more than once."
            yield Refusal(Rank.TOGETHER, text, path, None, "different names", f"'{name}' twice")


def _choice(
    raw: Mapping[str, object], key: str, list_key: str, words: tuple[str, ...]
) -> Iterator[Refusal]:
    if key not in raw:
        return
    value = raw[key]
    if isinstance(value, str):
        if value not in words:
            yield refusals.wrong_value(key, words, value)
    elif not isinstance(value, Mapping):
        yield refusals.wrong_type(key, "one of a string or object", value)
    else:
        yield from _named(raw, key, list_key, value)
    if list_key not in raw:
        rank = Rank.TOOL_CHOICE if key == "tool_choice" else Rank.FUNCTION_CALL
        yield _only_with(key, list_key, rank)


def _named(
    raw: Mapping[str, object], key: str, list_key: str, value: Mapping[str, object]
) -> Iterator[Refusal]:
    path, function = key, value
    if key == "tool_choice":
        yield from refusals.keys(value, key, ("type", "function"), ("type", "function"))
        if value.get("type", "function") != "function":
            yield refusals.wrong_value(f"{key}.type", ("function",), value["type"])
        if "function" not in value:
            return
        path, inner = f"{key}.function", value["function"]
        if not isinstance(inner, Mapping):
            yield refusals.wrong_type(path, "an object", inner)
            return
        function = inner
    yield from refusals.keys(function, path, ("name",), ("name",))
    if "name" not in function:
        return
    name = function["name"]
    yield from refusals.name(f"{path}.name", name)
    offered = _tool_names if list_key == "tools" else _function_names
    if list_key in raw and name not in offered(raw[list_key]):
        text = f"Invalid value for '{key}': '{name}' is not one of the provided {list_key}."
        yield Refusal(Rank.NAMED, text, key, None, f"one of the '{list_key}'", f"'{name}'")


def _response_format(value: object) -> Iterator[Refusal]:
    path = "response_format"
    if not isinstance(value, Mapping):
        yield refusals.wrong_type(path, "an object", value)
        return
    kind = value.get("type")
    if "type" not in value:
        yield refusals.missing(f"{path}.type")
    elif kind not in _FORMATS:
        yield refusals.wrong_value(f"{path}.type", _FORMATS, kind)
    elif kind == "json_schema":
        yield from refusals.keys(value, path, ("type", kind), ("type", kind))
        yield from _schema(f"{path}.{kind}", value.get(kind))
    else:
        yield from refusals.keys(value, path, ("type",), ("type",))


def _schema(path: str, value: object) -> Iterator[Refusal]:
    if not isinstance(value, Mapping):
        if value is not None:
            yield refusals.wrong_type(path, "an object", value)
        return
    yield from refusals.keys(value, path, ("name", "description", "schema", "strict"), ("name",))
    if "name" in value:
        yield from refusals.name(f"{path}.name", value["name"])
    if "description" in value:
        yield from refusals.string(f"{path}.description", value["description"])
    if value.get("strict") is not None:
        yield from refusals.boolean(f"{path}.strict", value["strict"])
    schema = value.get("schema", {})
    if not isinstance(schema, Mapping):
        yield refusals.wrong_type(f"{path}.schema", "an object", schema)
    elif "schema" in value and (fault := schemas.fault(schema, strict=value.get("strict") is True)):
        text = f"Invalid schema for response_format '{value.get('name')}': {fault.reason}"
        place = (*refusals.path_of(f"{path}.schema"), *fault.path)
        yield Refusal(Rank.SCHEMA, text, "response_format", None, fault.expected, fault.got, place)
