"""JSON Schemas that a request brings along: well-formed, and in the strict subset where asked.

The rules and limits are those of the reference's section 5 (the later limits), the words those of
the hosted service. Knows nothing of requests, of grammars, or whether a schema compiles to one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from orchestrator.spec.patterns import pattern_fault
from orchestrator.spec.refusals import KeyPath, show

MAX_PROPERTIES = 5000
MAX_LEVELS = 10
MAX_ENUM_VALUES = 1000
MAX_CHARACTERS = 120_000
LARGE_ENUM = 250
MAX_LARGE_ENUM_CHARACTERS = 15_000
_CACHED = 64
_FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid",
)  # fmt: skip
_TYPING = ("type", "enum", "const", "anyOf", "$ref")
_DEFINITIONS = ("$defs", "definitions")
_NOTES = frozenset(("title", "description", "$comment", "$schema"))
_KEYWORDS = _NOTES | frozenset(
    ("type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf",
     "$defs", "definitions", "$ref", "pattern", "format", "minimum", "maximum",
     "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a schema: `path` inside it, `reason` in the service's words.

    `expected` and `got` say the same in plain words, for a file.
    """

    path: KeyPath
    reason: str
    expected: str
    got: str


def fault(schema: Mapping[str, object], *, strict: bool, arguments: bool = False) -> Fault | None:
    """The first thing wrong with `schema`, or None.

    Any schema must be well-formed in its own dialect (2020-12 where it names none).
    `arguments`: it describes a function's arguments, so its root is an object (`{}` counts as
    one). `strict`: it must lie in the strict subset.
    """
    try:
        text = json.dumps(schema)
    except RecursionError:
        return _too_deep()
    return _fault(text, strict, arguments)


@lru_cache(maxsize=_CACHED)
def _fault(text: str, strict: bool, arguments: bool) -> Fault | None:
    """The same for a schema's JSON text: a job asks once per request for the same schema."""
    try:
        schema = json.loads(text)
        if found := _malformed(schema):
            return found
    except RecursionError:
        return _too_deep()
    if (strict or (arguments and schema)) and schema.get("type") != "object":
        return _no_object(schema.get("type"))
    nodes = list(_nodes(schema)) if strict else []
    faults = (_node_fault(schema, path, node) for path, node, _ in nodes)
    return next((found for found in faults if found), None) or _limits(nodes)


def _no_object(kind: object) -> Fault:
    reason = f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{kind}\"'."
    got = "no 'type'" if kind is None else f"'type: {kind}'"
    return Fault(("type",), reason, "'type: object' at the root", got)


def _too_deep() -> Fault:
    text = "schema is nested too deeply."
    return Fault((), text, f"at most {MAX_LEVELS} levels", "a schema nested too deeply to be read")


def _malformed(schema: Any) -> Fault | None:
    # Imported here: it takes longer than all else of a command that only reads.
    import jsonschema

    formats = jsonschema.FormatChecker(formats=())
    formats.checks("regex", raises=ValueError)(_is_pattern)
    dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    checker = dialect(dialect.META_SCHEMA, format_checker=formats)
    error = next(checker.iter_errors(schema), None)
    if error is None:
        return None
    reason = f"{error.message} ({error.cause})" if error.cause else error.message
    got = f"one that is refused: {reason}"
    return Fault(tuple(error.absolute_path), f"{reason}.", "a JSON Schema", got)


def _is_pattern(value: object) -> bool:
    """Whether a `pattern` can be compiled, here and wherever a text is checked against it."""
    if isinstance(value, str) and (fault := pattern_fault(value)):
        raise ValueError(fault)
    return True


Node = tuple[KeyPath, Any, int]
"""Where in the schema; the schema there; its level: how many objects and arrays, itself included,
stand one inside the other. References are not followed: a definition counts from where it is."""


def _nodes(schema: Any) -> Iterator[Node]:
    """Every schema of the subset inside `schema`, itself first, in the order of the text."""
    waiting: list[tuple[KeyPath, Any, int]] = [((), schema, 0)]
    while waiting:
        path, node, above = waiting.pop()
        level = above + (not {"object", "array"}.isdisjoint(_types(node)))
        yield path, node, level
        waiting.extend(reversed([((*path, *step), inner, level) for step, inner in _inner(node)]))


def _inner(node: Any) -> Iterator[tuple[KeyPath, Any]]:
    if not isinstance(node, Mapping):
        return
    for key in ("properties", *_DEFINITIONS):
        for name, inner in node.get(key, {}).items():
            yield (key, name), inner
    if "items" in node:
        yield ("items",), node["items"]
    for position, inner in enumerate(node.get("anyOf", ())):
        yield ("anyOf", position), inner


def _types(node: Any) -> Sequence[str]:
    kind = node.get("type", ()) if isinstance(node, Mapping) else ()
    return (kind,) if isinstance(kind, str) else tuple(kind)


def _node_fault(root: Any, path: KeyPath, node: Any) -> Fault | None:
    if not isinstance(node, Mapping) or not any(key in node for key in _TYPING):
        got = "one without" if isinstance(node, Mapping) and node else show(node)
        return _in(path, "schema must have a 'type' key.", "a schema with a 'type'", got)
    for key in node:
        if key not in _KEYWORDS or (key == "anyOf" and not path):
            expected = f"a schema without '{key}' ({'at its root' if key == 'anyOf' else 'strict'})"
            return _in(path, f"'{key}' is not permitted.", expected, f"'{key}'", key)
    if "$ref" in node:
        return _reference(root, path, node)
    kinds = _types(node)
    if "array" in kinds and "items" not in node:
        return _in(path, "array schema missing items.", "a key 'items'", "none")
    if (form := node.get("format", "date")) not in _FORMATS:
        expected = f"one of {', '.join(_FORMATS)}"
        return _in(path, f"'{form}' is not a valid format.", expected, show(form), "format")
    return _object(path, node) if "object" in kinds else None


def _in(context: KeyPath, reason: str, expected: str, got: str, *key: str) -> Fault:
    """A fault of the schema at `context`, or of its `key`; the service writes a Python tuple."""
    told = tuple(map(str, context))
    return Fault((*context, *key), f"In context={told}, {reason}", expected, got)


def _object(path: KeyPath, node: Mapping[str, Any]) -> Fault | None:
    if node.get("additionalProperties") is not False:
        reason = "'additionalProperties' is required to be supplied and to be false."
        got = show(node["additionalProperties"]) if "additionalProperties" in node else "none"
        key = ("additionalProperties",) if "additionalProperties" in node else ()
        return _in(path, reason, "'additionalProperties: false'", got, *key)
    properties, required = node.get("properties", {}), node.get("required", ())
    missing = [name for name in properties if name not in set(required)]
    extra = [name for name in required if name not in properties]
    if not missing and not extra:
        return None
    told = f"Missing '{missing[0]}'" if missing else f"Extra required key '{extra[0]}' supplied"
    reason = (
        "'required' is required to be supplied and to be an array including every key in "
        f"properties. {told}."
    )
    got = f"one without '{missing[0]}'" if missing else f"'{extra[0]}' too"
    key = ("required",) if "required" in node else ()
    return _in(path, reason, "'required' with every property, and no other", got, *key)


def _reference(root: Any, path: KeyPath, node: Mapping[str, Any]) -> Fault | None:
    beside = {key for key in node if key != "$ref" and key not in _NOTES}
    if beside - {"$defs", "definitions"}:
        told = ", ".join(map(repr, sorted(beside)))
        return _in(path, f"$ref cannot have keywords {{{told}}}.", "a '$ref' by itself", told)
    seen: list[str] = []
    while isinstance(node, Mapping) and "$ref" in node:
        target = node["$ref"]
        node = _found(root, target)
        if node is None or target in seen:
            fate = "which was not found in the schema" if node is None else "which leads to itself"
            reason = f"reference to component '{target}' {fate}."
            return _in(path, reason, "a '$ref' to a part of the schema", show(target), "$ref")
        seen.append(target)
    return None


def _found(root: Any, reference: str) -> Any:
    """What a reference like `#/$defs/a` points to inside `root`; None if nothing."""
    start, *steps = unquote(reference).split("/")
    if start != "#":
        return None
    node = root
    for step in steps:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node


def _limits(nodes: Sequence[Node]) -> Fault | None:
    """What the schema is too large in. `nodes`: all of its schemas."""
    path, _, level = max(nodes, key=lambda node: node[2], default=((), None, 0))
    if level > MAX_LEVELS:
        reason = f"{level} levels of nesting exceeds limit of {MAX_LEVELS}."
        return Fault(path, reason, f"at most {MAX_LEVELS} levels of nesting", str(level))
    names = [name for _, node, _ in nodes for name in node.get("properties", ())]
    defined = [name for _, node, _ in nodes for key in _DEFINITIONS for name in node.get(key, ())]
    enums = [(path, [_length(value) for value in node["enum"]])
             for path, node, _ in nodes if "enum" in node]  # fmt: skip
    constants = [_length(node["const"]) for _, node, _ in nodes if "const" in node]
    values = [length for _, lengths in enums for length in lengths]
    characters = sum(map(len, names + defined)) + sum(values + constants)
    for count, limit, what in (
        (len(names), MAX_PROPERTIES, "parameters"),
        (len(values), MAX_ENUM_VALUES, "enum values"),
        (characters, MAX_CHARACTERS, "characters of names and values"),
    ):
        if count > limit:
            reason = f"{count} {what} exceeds limit of {limit}."
            return Fault((), reason, f"at most {limit} {what}", str(count))
    for path, lengths in enums:
        if len(lengths) > LARGE_ENUM and sum(lengths) > MAX_LARGE_ENUM_CHARACTERS:
            what = f"characters in an enum of more than {LARGE_ENUM} values"
            reason = f"{sum(lengths)} {what} exceeds limit of {MAX_LARGE_ENUM_CHARACTERS}."
            plain = f"at most {MAX_LARGE_ENUM_CHARACTERS} {what}"
            return _in(path, reason, plain, str(sum(lengths)), "enum")
    return None


def _length(value: object) -> int:
    return len(value) if isinstance(value, str) else len(json.dumps(value))
