"""Which schemas are taken, and what the others are refused with."""

from typing import Any

import pytest

from orchestrator.spec import schemas
from orchestrator.spec.schemas import fault

TEXT: dict[str, Any] = {"type": "string"}


def record(**properties: Any) -> dict[str, Any]:
    """An object in the strict subset with these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def nested(levels: int, leaf: Any = TEXT) -> Any:
    """`levels` objects and arrays in turn, one in the other, around `leaf`."""
    schema = leaf
    for level in range(levels, 0, -1):
        schema = record(x=schema) if level % 2 else {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        record(),
        {"type": "object", "additionalProperties": False},
        record(a=TEXT, b={"type": ["integer", "null"]}, c={"type": "boolean"}, d={"type": "null"}),
        record(a={"enum": ["x", 1, None]}, b={"const": {"y": 1}}),
        record(a={"type": "array", "items": record(b={"anyOf": [TEXT, record(c=TEXT)]})}),
        {**record(a={"$ref": "#/$defs/a"}), "$defs": {"a": record(b={"$ref": "#/$defs/b"}),
                                                      "b": TEXT}},
        {**record(a={"$ref": "#/definitions/x~1y"}), "definitions": {"x/y": TEXT}},
        record(next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        record(a={"type": "string", "pattern": "^[a-z]+$", "description": "d", "title": "t"}),
        *(record(a={"type": "string", "format": form}) for form in (
            "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")),
        record(a={"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.5,
                  "exclusiveMinimum": -1, "exclusiveMaximum": 2}),
        record(a={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3}),
        record(a={"$ref": "#/$defs/a", "description": "d"}) | {"$defs": {"a": TEXT}},
        nested(10),
        nested(9, {"anyOf": [{"anyOf": [{"anyOf": [record(a=TEXT)]}]}]}),
        record(a={"enum": [f"v{i}" for i in range(1000)]}),
        record(a={"enum": [str(i).rjust(60, "x") for i in range(250)]}),
        record(a={"enum": [str(i).rjust(50, "x") for i in range(300)]}),
        record(a={"const": "x" * 119_999}),
    ],
)  # fmt: skip
def test_in_the_strict_subset(schema: Any) -> None:
    assert fault(schema, strict=True) is None
    assert fault(schema, strict=True, arguments=True) is None


REQUIRED = "'required' is required to be supplied and to be an array including every key in "
CLOSED = "'additionalProperties' is required to be supplied and to be false."
OBJECT = "schema must be a JSON Schema of 'type: \"object\"', got 'type: "
OUTSIDE: list[tuple[Any, str, tuple[str | int, ...]]] = [
    ({"type": "array", "items": TEXT}, OBJECT + "\"array\"'.", ("type",)),
    ({"anyOf": [record()]}, OBJECT + "\"None\"'.", ("type",)),
    ({"type": ["object", "null"]}, OBJECT + "\"['object', 'null']\"'.", ("type",)),
    ({**record(), "anyOf": [record()]}, "In context=(), 'anyOf' is not permitted.", ("anyOf",)),
    ({"type": "object"}, f"In context=(), {CLOSED}", ()),
    ({**record(), "additionalProperties": TEXT}, f"In context=(), {CLOSED}",
     ("additionalProperties",)),
    (record(a={"type": "array", "items": {"type": "object"}}),
     f"In context=('properties', 'a', 'items'), {CLOSED}", ("properties", "a", "items")),
    (record(a={"anyOf": [TEXT, {"type": "object"}]}),
     f"In context=('properties', 'a', 'anyOf', '1'), {CLOSED}", ("properties", "a", "anyOf", 1)),
    ({**record(), "$defs": {"d": {"type": ["object", "null"]}}},
     f"In context=('$defs', 'd'), {CLOSED}", ("$defs", "d")),
    ({**record(a=TEXT, b=TEXT), "required": ["a"]},
     f"In context=(), {REQUIRED}properties. Missing 'b'.", ("required",)),
    ({"type": "object", "properties": {"a": TEXT}, "additionalProperties": False},
     f"In context=(), {REQUIRED}properties. Missing 'a'.", ()),
    ({**record(a=TEXT), "required": ["a", "b"]},
     f"In context=(), {REQUIRED}properties. Extra required key 'b' supplied.", ("required",)),
    (record(a={}), "In context=('properties', 'a'), schema must have a 'type' key.",
     ("properties", "a")),
    (record(a=True), "In context=('properties', 'a'), schema must have a 'type' key.",
     ("properties", "a")),
    (record(a={"type": "array"}), "In context=('properties', 'a'), array schema missing items.",
     ("properties", "a")),
    (record(a={"type": "string", "format": "uri"}),
     "In context=('properties', 'a'), 'uri' is not a valid format.",
     ("properties", "a", "format")),
    (record(a={"$ref": "#/$defs/a"}), "In context=('properties', 'a'), reference to component "
     "'#/$defs/a' which was not found in the schema.", ("properties", "a", "$ref")),
    (record(a={"$ref": "https://example.org/a"}), "In context=('properties', 'a'), reference to "
     "component 'https://example.org/a' which was not found in the schema.",
     ("properties", "a", "$ref")),
    ({**record(a={"$ref": "#/$defs/b"}),
      "$defs": {"b": {"$ref": "#/$defs/c"}, "c": {"$ref": "#/$defs/b"}}},
     "In context=('properties', 'a'), reference to component '#/$defs/b' which leads to itself.",
     ("properties", "a", "$ref")),
    (record(a={"$ref": "#", "type": "object"}),
     "In context=('properties', 'a'), $ref cannot have keywords {'type'}.", ("properties", "a")),
    (nested(11), "11 levels of nesting exceeds limit of 10.", ("properties", "x", "items") * 5),
    (record(a={"enum": list(range(600))}, b={"enum": list(range(401))}),
     "1001 enum values exceeds limit of 1000.", ()),
    (record(a={"const": "x" * 120_000}),
     "120001 characters of names and values exceeds limit of 120000.", ()),
    (record(a={"enum": [str(i).rjust(60, "x") for i in range(251)]}),
     "In context=('properties', 'a'), 15060 characters in an enum of more than 250 values exceeds "
     "limit of 15000.", ("properties", "a", "enum")),
]  # fmt: skip
NEVER: dict[str, Any] = {
    "allOf": [TEXT], "oneOf": [TEXT], "not": TEXT, "if": TEXT, "then": TEXT, "else": TEXT,
    "dependentRequired": {"a": ["b"]}, "dependentSchemas": {"a": TEXT},
    "patternProperties": {"a": TEXT}, "default": "x", "minLength": 1, "maxLength": 1,
    "uniqueItems": True, "contains": TEXT, "minContains": 1, "maxContains": 1,
    "minProperties": 1, "maxProperties": 1, "propertyNames": TEXT, "prefixItems": [TEXT],
    "unevaluatedItems": False, "unevaluatedProperties": False, "$id": "x", "$anchor": "x",
    "$dynamicRef": "#", "examples": ["x"],
}  # fmt: skip


@pytest.mark.parametrize(("schema", "reason", "path"), OUTSIDE)
def test_outside_the_strict_subset(schema: Any, reason: str, path: tuple[str | int, ...]) -> None:
    found = fault(schema, strict=True)
    assert found
    assert (found.reason, found.path) == (reason, path)
    assert found.expected
    assert found.got


def test_the_number_of_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    assert schemas.MAX_PROPERTIES == 5000
    monkeypatch.setattr(schemas, "MAX_PROPERTIES", 6)  # a real one takes seconds
    inner = record(a=TEXT, b=TEXT)
    both = {"a": inner, "b": {"type": "array", "items": record(c=TEXT)}}
    assert fault(record(**both, d=TEXT), strict=True) is None
    found = fault(record(**both, d=TEXT, e=TEXT), strict=True)
    assert found
    assert found.reason == "7 parameters exceeds limit of 6."


@pytest.mark.parametrize("keyword", NEVER)
def test_a_keyword_that_the_strict_subset_never_has(keyword: str) -> None:
    schema = record(a={"type": "string", keyword: NEVER[keyword]})
    found = fault(schema, strict=True)
    assert found
    assert found.reason == f"In context=('properties', 'a'), '{keyword}' is not permitted."
    assert found.path == ("properties", "a", keyword)
    assert fault(schema, strict=False) is None


@pytest.mark.parametrize(
    "schema",
    [{}, {"type": "array"}, nested(30), {"not": {}}, OUTSIDE[6][0], {"pattern": r"^\p{L}+$"}],
)
def test_whatever_is_well_formed_will_do_where_it_need_not_be_strict(schema: Any) -> None:
    assert fault(schema, strict=False) is None


@pytest.mark.parametrize(
    ("schema", "message", "path"),
    [
        ({"type": "strin"}, "'strin' is not valid under any of the given schemas.", ("type",)),
        ({"properties": {"a": 5}}, "5 is not of type 'object', 'boolean'.", ("properties", "a")),
        ({"items": {"required": "a"}}, "'a' is not of type 'array'.", ("items", "required")),
        ({"pattern": "("}, "'(' is not a 'regex' (missing ) at position 1).", ("pattern",)),
        ({"pattern": "((a{1000}){1000}){1000}"}, "'((a{1000}){1000}){1000}' is not a 'regex' (its "
         "repeats written out are more than 100000 atoms).", ("pattern",)),
        ({"patternProperties": {"[": {}}}, "'[' is not a 'regex' (unterminated character set at "
         "position 1).", ("patternProperties",)),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "exclusiveMinimum": 1},
         "1 is not of type 'boolean'.", ("exclusiveMinimum",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_malformed(strict: bool, schema: Any, message: str, path: Any) -> None:
    found = fault(schema, strict=strict)
    assert found
    assert (found.reason, found.path) == (message, path)


def test_the_arguments_of_a_function_are_an_object() -> None:
    assert fault({}, strict=False, arguments=True) is None
    assert fault({"type": "object"}, strict=False, arguments=True) is None
    for schema, told in (({"properties": {}}, "None"), ({"type": "array"}, "array")):
        found = fault(schema, strict=False, arguments=True)
        assert found
        assert found.reason == f'{OBJECT}"{told}"\'.'


@pytest.mark.parametrize("strict", [True, False])
def test_nested_without_end(strict: bool) -> None:
    schema: Any = TEXT
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    found = fault(schema, strict=strict)
    assert found
    assert found.reason == "schema is nested too deeply."
