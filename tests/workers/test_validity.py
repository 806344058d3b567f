"""The check of finished texts: JSON Schema's meaning, and nothing that can hold a worker up."""

import json
import socket
from typing import Any

import pytest

from workers.grammars.validity import Validity


@pytest.mark.parametrize(
    ("schema", "text", "fault"),
    [
        ({"type": "integer"}, "1", None),
        ({"type": "integer"}, "1.5", "$: 1.5 is not of type 'integer'"),
        ({"type": "integer"}, "1" * 5_000, None),
        ({"type": "integer"}, "", "not JSON"),
        ({"type": "object"}, '{"a": ', "not JSON"),
        ({"multipleOf": 0.1}, "0.3", None),
        ({"multipleOf": 0.1}, "0.35", "not a multiple"),
        ({"multipleOf": 3}, "9" * 5_000, None),
        ({"multipleOf": 0.01}, "1e400", None),
        ({"pattern": "^\\d+$"}, '"12"', None),
        ({"pattern": "^\\d+$"}, '"1a"', "does not match"),
        ({"pattern": "^\\W$"}, '"é"', None),
        ({"properties": {"a": {"type": "null"}}}, '{"a": 1}', "$.a: 1 is not of type 'null'"),
        ({"patternProperties": {"^x": {"type": "null"}}}, '{"x1": 1}', "not of type"),
        (
            {"patternProperties": {"^x": {}}, "additionalProperties": False},
            '{"x": 1}',
            None,
        ),
        ({"additionalProperties": False}, '{"y": 1}', "was unexpected"),
        ({"$defs": {"A": {"type": "null"}}, "$ref": "#/$defs/A"}, "1", "not of type"),
    ],
)
def test_what_is_wrong_with_a_text(schema: Any, text: str, fault: str | None) -> None:
    found = Validity(schema).fault(text)
    assert found is None if fault is None else found is not None and fault in found


def test_a_schema_that_is_none_says_why() -> None:
    with pytest.raises(ValueError, match="not a valid JSON Schema: 'strnig'"):
        Validity({"type": "strnig"})


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(Exception, match=r"example\.com"):
        Validity({"$ref": "https://example.com/schema.json"}).fault("1")


@pytest.mark.parametrize(
    "schema",
    [
        {"additionalProperties": {"pattern": "^(a+)+$"}},
        {"patternProperties": {"^(a+)+$": {"type": "integer"}}},
        {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False},
    ],
)
@pytest.mark.timeout(30)
def test_a_pattern_without_end_holds_nobody_up(schema: Any) -> None:
    endless = "a" * 60 + "!"
    Validity(schema).fault(json.dumps({endless: endless}))


def test_a_text_nested_beyond_all_measure_is_no_error() -> None:
    found = Validity({"$ref": "#/$defs/A", "$defs": {"A": {"items": {"$ref": "#/$defs/A"}}}})
    assert found.fault("[" * 400 + "]" * 400) is None
    assert "not JSON" in (found.fault("[" * 100_000 + "]" * 100_000) or "")
