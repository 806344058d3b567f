"""What can be wrong with one chat-completion parameter, in the API's words and in plain ones.

A check yields `Refusal`s; `first` picks the one the API would report. The rank is the row of
the table "Cross-parameter rules": a wrong type anywhere is told before a value out of range.
Knows nothing of the single parameters.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from orchestrator.errors import ParameterError

NAME = re.compile(r"[a-zA-Z0-9_-]+")
MAX_NAME = 64
SHOWN = 60
KeyPath = tuple[str | int, ...]


class Rank(IntEnum):
    """The order in which refusals are reported; the first one wins."""

    UNKNOWN = 0
    MISSING = 1
    TYPE = 2
    VALUE = 3
    RANGE = 4
    LENGTH = 5
    PATTERN = 6
    BIAS_KEY = 7
    TOP_LOGPROBS = 8
    STREAM_OPTIONS = 9
    TOOL_CHOICE = 10
    PARALLEL = 11
    FUNCTION_CALL = 12
    NAMED = 13
    TOGETHER = 14
    SEQUENCE = 15
    JSON_WORD = 16
    SCHEMA = 17
    FUNCTION_SCHEMA = 18


@dataclass(frozen=True, slots=True)
class Refusal:
    """One failure: `message`, `param`, `code` as the API says it; `expected`, `got` for a file.

    `path` is the exact place, where `param` names only the parameter it lies in.
    """

    rank: Rank
    message: str
    param: str
    code: str | None
    expected: str
    got: str
    path: KeyPath = ()

    def error(self) -> ParameterError:
        error = ParameterError(self.message, self.param, self.code)
        error.expected, error.got = self.expected, self.got
        error.path = self.path or path_of(self.param)
        return error


def first(refusals: Iterable[Refusal]) -> Refusal | None:
    """The refusal of the lowest rank; among equals the one that was found first."""
    return min(refusals, key=lambda refusal: refusal.rank, default=None)


def dotted(path: KeyPath) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def path_of(param: str) -> KeyPath:
    """`messages[0].content` (or the API's `messages.[0].content`) as a path of keys."""
    pieces = re.findall(r"\[(\d+)\]|([^.\[\]]+)", param)
    return tuple(int(index) if index else key for index, key in pieces)


def show(value: object) -> str:
    """A value as an error's `got`: short, on one line, in the words of YAML and JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else value[: SHOWN - 3] + "...")
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}" if value else "an empty list"
    text = f"{value:.6g}" if isinstance(value, int) and abs(value) >= 10**SHOWN else str(value)
    return text


def names(values: Iterable[str], conjunction: str = "and") -> str:
    """`'a', 'b', and 'c'`."""
    quoted = [f"'{value}'" for value in values]
    if len(quoted) < 3:
        return f" {conjunction} ".join(quoted)
    return f"{', '.join(quoted[:-1])}, {conjunction} {quoted[-1]}"


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a decimal" if math.isfinite(value) else "a number that is not finite"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, Mapping) else "an array"


def unknown(path: str, allowed: Iterable[str]) -> Refusal:
    plain = f"one of {', '.join(sorted(allowed))}"
    name = path.rsplit(".", 1)[-1]
    return Refusal(
        Rank.UNKNOWN, f"Unknown parameter: '{path}'.", path, "unknown_parameter", plain, f"'{name}'"
    )


def missing(path: str) -> Refusal:
    message, plain = f"Missing required parameter: '{path}'.", f"a key '{path.rsplit('.', 1)[-1]}'"
    return Refusal(Rank.MISSING, message, path, "missing_required_parameter", plain, "none")


def wrong_type(path: str, kind: str, value: object, expected: str = "") -> Refusal:
    message = f"Invalid type for '{path}': expected {kind}, but got {_kind(value)} instead."
    return Refusal(Rank.TYPE, message, path, "invalid_type", expected or kind, show(value))


def wrong_value(path: str, supported: Iterable[str], value: object) -> Refusal:
    supported = tuple(supported)
    shown = value if isinstance(value, str) else show(value)
    verb = "Supported values are" if len(supported) > 1 else "Supported value is"
    message = f"Invalid value: '{shown}'. {verb}: {names(supported)}."
    return Refusal(Rank.VALUE, message, path, "invalid_value", names(supported, "or"), show(value))


def empty(path: str) -> Refusal:
    message = (
        f"Invalid '{path}': empty array. Expected an array with minimum length 1, "
        "but got an empty array instead."
    )
    return Refusal(
        Rank.LENGTH, message, path, "empty_array", "a list of at least 1", "an empty list"
    )


def too_long(path: str, maximum: int, length: int) -> Refusal:
    message = (
        f"Invalid '{path}': array too long. Expected an array with maximum length {maximum}, "
        f"but got an array with length {length} instead."
    )
    plain = f"a list of at most {maximum}"
    return Refusal(
        Rank.LENGTH, message, path, "array_above_max_length", plain, f"a list of {length}"
    )


def keys(
    value: Mapping[str, object], path: str, allowed: Iterable[str], required: Iterable[str]
) -> Iterator[Refusal]:
    """Unknown and missing keys of an object; `path` is empty for the request itself."""
    prefix = f"{path}." if path else ""
    allowed = tuple(allowed)
    for key in value:
        if key not in allowed:
            yield unknown(f"{prefix}{key}", allowed)
    for key in required:
        if key not in value:
            yield missing(f"{prefix}{key}")


def number(path: str, value: object, low: float, high: float, whole: bool) -> Iterator[Refusal]:
    """An integer (`whole`) or a decimal from `low` to `high`; booleans are not numbers."""
    kind, word = ("an integer", "integer") if whole else ("a decimal", "decimal")
    expected = f"{'an integer' if whole else 'a number'} from {low} to {high}"
    types = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, types) or not math.isfinite(value):
        yield wrong_type(path, kind, value, expected)
        return
    for bad, side, sign, bound, code in (
        (value < low, "below minimum", ">=", low, "below_min"),
        (value > high, "above maximum", "<=", high, "above_max"),
    ):
        if bad:
            message = (
                f"Invalid '{path}': {word} {side} value. "
                f"Expected a value {sign} {bound}, but got {show(value)} instead."
            )
            yield Refusal(Rank.RANGE, message, path, f"{word}_{code}_value", expected, show(value))


def boolean(path: str, value: object) -> Iterator[Refusal]:
    if not isinstance(value, bool):
        yield wrong_type(path, "a boolean", value, "true or false")


def string(path: str, value: object) -> Iterator[Refusal]:
    if not isinstance(value, str):
        yield wrong_type(path, "a string", value)


def empty_string(path: str) -> Refusal:
    message = (
        f"Invalid '{path}': empty string. Expected a string with minimum length 1, "
        "but got an empty string instead."
    )
    return Refusal(
        Rank.LENGTH, message, path, "empty_string", "a string of at least 1 character", "''"
    )


def name(path: str, value: object) -> Iterator[Refusal]:
    """The name of a participant, tool, function or schema."""
    if not isinstance(value, str):
        yield wrong_type(path, "a string", value)
    elif not value:
        yield empty_string(path)
    elif len(value) > MAX_NAME:
        message = (
            f"Invalid '{path}': string too long. Expected a string with maximum length "
            f"{MAX_NAME}, but got a string with length {len(value)} instead."
        )
        code, plain = "string_above_max_length", f"at most {MAX_NAME} characters"
        yield Refusal(Rank.LENGTH, message, path, code, plain, str(len(value)))
    elif not NAME.fullmatch(value):
        message = (
            f"Invalid '{path}': string does not match pattern. "
            "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
        )
        plain = "1 to 64 letters, digits, '_' or '-'"
        yield Refusal(Rank.PATTERN, message, path, "invalid_value", plain, show(value))
