"""Whether a text is what a JSON Schema asks for.

Knows nothing of tokens or grammars. Nothing is ever fetched for a `$ref`, and no pattern can hold
a worker up: what takes longer than a moment to match counts as matching.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jsonschema
import regex
from jsonschema.validators import extend, validator_for
from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

_PATTERN_SECONDS = 0.2
_DEEPEST = 100
_SHOWN = 200  # characters of a message, which quotes the value


class Validity:
    """A schema, ready to check texts. Raises ValueError if it is no JSON Schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        draft = validator_for(schema, default=jsonschema.Draft202012Validator)
        if _depth(schema) > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} levels deep")
        try:
            draft.check_schema(dict(schema))
        except jsonschema.SchemaError as error:
            raise ValueError(f"not a valid JSON Schema: {error.message}") from error
        self._validator = _ours(draft)(dict(schema), registry=REGISTRY)

    def fault(self, text: str) -> str | None:
        """What is wrong with `text`; None: it is JSON and valid."""
        try:
            value = json.loads(text, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
        try:
            wrong = next(self._validator.iter_errors(value), None)
        except RecursionError:
            return None  # too deep to look at: the grammar has seen all of it
        return None if wrong is None else f"{wrong.json_path}: {wrong.message[:_SHOWN]}"


def _depth(value: Any) -> int:
    """How deep objects and arrays are nested; without recursion."""
    depth, level = 0, [value]
    while level:
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [one for some in inner for one in some if isinstance(one, (dict, list))]
        depth += 1
    return depth


@functools.cache
def _ours(draft: Any) -> Any:
    """The draft's validator with our own checks in place of some of its."""
    known = {key: check for key, check in _CHECKS.items() if key in draft.VALIDATORS}
    return extend(draft, known)  # type: ignore[no-untyped-call]


def _integer(digits: str) -> int:
    """Of any length: `int` itself refuses thousands of digits."""
    return int(Decimal(digits))


def _matches(pattern: str, text: str) -> bool:
    """As JSON Schema searches, where `\\d` and `\\w` may mean ASCII or all of Unicode."""
    try:
        return any(
            regex.search(pattern, text, flags, timeout=_PATTERN_SECONDS) is not None
            for flags in (regex.V0, regex.V0 | regex.ASCII)
        )
    except (TimeoutError, regex.error):
        return True


def _pattern(
    validator: Any, pattern: str, value: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not _matches(pattern, value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, patterns: Any, value: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, dict):
        for pattern, inner in patterns.items():
            for key in value:
                if _matches(pattern, key):
                    yield from validator.descend(value[key], inner, path=key, schema_path=pattern)


def _additional_properties(
    validator: Any, rule: Any, value: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    """`jsonschema`'s own, where no pattern decides what is additional."""
    if "patternProperties" not in schema:
        check = jsonschema.Draft202012Validator.VALIDATORS["additionalProperties"]
        yield from check(validator, rule, value, schema)


def _multiple_of(
    validator: Any, divisor: Any, value: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    """Exactly, in decimals: 0.3 is a multiple of 0.1."""
    if not validator.is_type(value, "number") or value in (float("inf"), float("-inf")):
        return
    if _exact(value) % _exact(divisor):
        yield jsonschema.ValidationError(f"{value} is not a multiple of {divisor}")


def _exact(number: Any) -> Fraction:
    return Fraction(number if isinstance(number, int) else str(number))


_CHECKS = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "multipleOf": _multiple_of,
}
