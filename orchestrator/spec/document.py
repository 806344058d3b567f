"""YAML text to plain values that remember their lines; the only file importing yaml.

Reads YAML as people mean it, which is JSON with less punctuation: no tags, anchors, aliases,
merge keys or second document; only `true`, `false` and `null` (and their capitalised forms, and
`~`) are not text; numbers are JSON's. So `on`, `no`, `2026-01-02`, `0o17`, `010`, `1_000`, `1:30`
and `.inf` are strings. Knows nothing of jobs.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.errors import SpecError
from orchestrator.spec.refusals import KeyPath, dotted, show

MAX_BYTES = 10 * 2**20
MAX_DEPTH = 32
MAX_VALUES = 500_000
MAX_DIGITS = 400

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WORDS: Mapping[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Document:
    """A file's plain values, and the line (from 1) on which each of them begins."""

    file: str
    value: Any
    lines: Mapping[KeyPath, int]

    def where(self, *path: str | int) -> str:
        """`jobs/x.yaml:12: sweep.temperature[2]`; the line of the nearest parent that has one."""
        known = path
        while known not in self.lines and known:
            known = known[:-1]
        place = f"{self.file}:{self.lines.get(known, 1)}"
        return f"{place}: {dotted(path)}" if path else place

    def refusal(self, path: KeyPath, expected: str, got: str) -> SpecError:
        return SpecError(self.where(*path), expected, got)

    def mapping(self, path: KeyPath, value: object, allowed: Iterable[str] = ()) -> dict[str, Any]:
        """`value` if it is a mapping with no keys but the `allowed` ones (none given: any)."""
        if not isinstance(value, dict):
            raise self.refusal(path, "a mapping", show(value))
        allowed = sorted(allowed)
        for key in value:
            if allowed and key not in allowed:
                got = f"'{key}'{suggestion(key, allowed)}"
                raise self.refusal((*path, key), f"one of {', '.join(allowed)}", got)
        return value

    def sequence(self, path: KeyPath, value: object, of: str) -> list[Any]:
        """`value` if it is a list of at least one."""
        if not isinstance(value, list) or not value:
            raise self.refusal(path, f"a list of {of}", show(value))
        return value

    def integer(self, path: KeyPath, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(path, f"an integer from {low} to {high}", show(value))
        return value

    def boolean(self, path: KeyPath, value: object) -> bool:
        if not isinstance(value, bool):
            raise self.refusal(path, "true or false", show(value))
        return value

    def text(self, path: KeyPath, value: object, expected: str = "a text", form: str = ".+") -> str:
        """`value` if it is a text that matches `form` as a whole."""
        if not isinstance(value, str) or not re.fullmatch(form, value, re.DOTALL):
            raise self.refusal(path, expected, show(value))
        return value


def suggestion(key: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'model'?)`, or nothing."""
    near = difflib.get_close_matches(key, list(allowed), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def read(text: str, *, file: str) -> Document:
    """Raises `SpecError` with file and line for whatever is not one plain YAML document."""
    try:
        if len(text.encode()) > MAX_BYTES:
            raise SpecError(file, f"a file of at most {MAX_BYTES} bytes", "more")
        return _Reader(file, yaml.parse(text, Loader=_LOADER)).document()
    except UnicodeEncodeError:
        raise SpecError(file, "text in UTF-8", "half a surrogate pair") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise SpecError(
            f"{file}{line}", "YAML", f"an error ({error.problem or error.context})"
        ) from None
    except yaml.YAMLError as error:
        raise SpecError(file, "YAML", f"an error ({str(error).splitlines()[0]})") from None


class _Reader:
    """Builds the tree from the parser's events, so that nothing is built beyond a bound."""

    def __init__(self, file: str, events: Iterator[Any]) -> None:
        self.file, self.events = file, events
        self.lines: dict[KeyPath, int] = {}

    def document(self) -> Document:
        next(self.events)  # the stream begins
        event = next(self.events)
        if not isinstance(event, yaml.DocumentStartEvent):
            raise SpecError(self.file, "a mapping", "an empty file")
        value = self.value(next(self.events), ())
        next(self.events)  # the document ends
        event = next(self.events)
        if isinstance(event, yaml.DocumentStartEvent):
            raise self.refusal(event, (), "one document", "a second one")
        return Document(self.file, value, self.lines)

    def refusal(self, event: Any, path: KeyPath, expected: str, got: str) -> SpecError:
        place = f"{self.file}:{event.start_mark.line + 1}"
        return SpecError(f"{place}: {dotted(path)}" if path else place, expected, got)

    def value(self, event: Any, path: KeyPath) -> Any:
        self.check(event, path)
        self.lines.setdefault(path, event.start_mark.line + 1)
        if len(self.lines) > MAX_VALUES:
            raise self.refusal(event, path, f"at most {MAX_VALUES} values in a file", "more")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, path)
        if len(path) >= MAX_DEPTH:
            raise self.refusal(event, path, f"at most {MAX_DEPTH} levels", "more")
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        return self.mapping(path)

    def check(self, event: Any, path: KeyPath) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise self.refusal(event, path, "no aliases", f"'*{event.anchor}'")
        if event.anchor is not None:
            raise self.refusal(event, path, "no anchors", f"'&{event.anchor}'")
        if event.tag is not None:
            raise self.refusal(event, path, "no tags", f"'{event.tag}'")

    def sequence(self, path: KeyPath) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self.value(event, (*path, len(values))))
        return values

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event, path)
            if key in values:
                line = self.lines[(*path, key)]
                expected = "each key once"
                raise self.refusal(
                    event, (*path, key), expected, f"it again (first on line {line})"
                )
            self.lines[(*path, key)] = event.start_mark.line + 1
            values[key] = self.value(next(self.events), (*path, key))
        return values

    def key(self, event: Any, path: KeyPath) -> str:
        self.check(event, path)
        if not isinstance(event, yaml.ScalarEvent):
            raise self.refusal(event, path, "a text as key", "a list or mapping as key")
        return self.text(event, path)

    def text(self, event: Any, path: KeyPath) -> str:
        if "\0" in event.value:
            raise self.refusal(event, path, "a text without NUL characters", show(event.value))
        return str(event.value)

    def scalar(self, event: Any, path: KeyPath) -> Any:
        text = self.text(event, path)
        if not event.implicit[0]:  # quoted, or a block: always a text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if not _DECIMAL.fullmatch(text):
            return text
        if len(text) > MAX_DIGITS:
            raise self.refusal(event, path, f"a number of at most {MAX_DIGITS} digits", show(text))
        number = int(text) if _INTEGER.fullmatch(text) else float(text)
        if isinstance(number, float) and math.isinf(number):
            raise self.refusal(event, path, "a number that fits 64 bits", show(text))
        return number
