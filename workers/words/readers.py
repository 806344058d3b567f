"""Readers of the text of calls, character by character: names and arguments as they come.

Each knows one way of writing calls and holds nothing back that is certain; what is no part of a
call is dropped. Knows nothing of tokens.
"""

import json
from collections.abc import Iterable
from typing import Protocol

from workers.words.text import Call, CallDelta


class Reader(Protocol):
    """The text of calls from their opening on."""

    @property
    def calls(self) -> tuple[Call, ...]: ...

    def read(self, text: str) -> Iterable[CallDelta]:
        """Take the next piece of text; what it made certain."""
        ...


class Told:
    """The calls told so far; pieces of one call that come at once are told as one delta."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._arguments: list[list[str]] = []
        self._fresh: list[CallDelta] = []

    @property
    def calls(self) -> tuple[Call, ...]:
        pairs = zip(self._names, self._arguments, strict=True)
        return tuple(Call(name, "".join(pieces)) for name, pieces in pairs)

    def name(self, name: str) -> None:
        self._fresh.append(CallDelta(len(self._names), name))
        self._names.append(name)
        self._arguments.append([])

    def arguments(self, piece: str) -> None:
        """More of the last call's arguments."""
        self._arguments[-1].append(piece)
        index, last = len(self._names) - 1, self._fresh[-1] if self._fresh else None
        if last is not None and last.index == index and last.name is None:
            self._fresh[-1] = CallDelta(index, None, last.arguments + piece)
        else:
            self._fresh.append(CallDelta(index, None, piece))

    @property
    def has_arguments(self) -> bool:
        return bool(self._arguments[-1])

    def fresh(self) -> list[CallDelta]:
        """What was told since the last time."""
        fresh, self._fresh = self._fresh, []
        return fresh


class Depth:
    """Where a JSON text stands: how deep, and whether inside of a string."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = self._escaped = False

    def take(self, character: str) -> None:
        if self.in_string:
            self.in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1


class ObjectReader:
    """Calls written as objects with `name` and `arguments` (or `parameters`), in any order."""

    def __init__(self) -> None:
        self._told, self._at = Told(), Depth()
        self._begin()

    def _begin(self) -> None:
        self._key, self._raw = "", ""
        self._named, self._early = False, ""  # arguments that came before the name

    @property
    def calls(self) -> tuple[Call, ...]:
        return self._told.calls

    def read(self, text: str) -> list[CallDelta]:
        for character in text:
            if self._at.depth > 0 or character == "{":
                self._take(character)
        return self._told.fresh()

    def _take(self, character: str) -> None:
        before, at = self._at.depth, self._at
        at.take(character)
        if before == 0:
            self._begin()
        elif before == 1 and not at.in_string and character in ":,}":
            self._part_ended(character)
        elif self._key in ("arguments", "parameters") and (before > 1 or at.depth > 1):
            self._argument(character)
        elif self._raw or not character.isspace():
            self._raw += character

    def _part_ended(self, character: str) -> None:
        """A key before a colon, or a value before a comma or the end of the object."""
        if character == ":":
            self._key, self._raw = _string(self._raw), ""
            return
        if self._key == "name" and not self._named:
            self._told.name(_string(self._raw))
            self._named = True
            if self._early:
                self._told.arguments(self._early)
        elif self._key in ("arguments", "parameters") and self._raw:
            self._argument(_string(self._raw))  # an object written as a string
        if character == "}" and self._named and not self._told.has_arguments:
            self._told.arguments("{}")
        self._key, self._raw = "", ""

    def _argument(self, piece: str) -> None:
        if self._named:
            self._told.arguments(piece)
        else:
            self._early += piece


def _string(raw: str) -> str:
    try:
        value = json.loads(raw)
    except ValueError:
        return raw
    return value if isinstance(value, str) else raw


class BracketReader:
    """Calls written as `[TOOL_CALLS]name[ARGS]{...}`, one after the other."""

    def __init__(self, before: str) -> None:
        self._told, self._at, self._before = Told(), Depth(), before
        self._named = False  # and its arguments are not whole
        self._seen = ""  # outside of arguments

    @property
    def calls(self) -> tuple[Call, ...]:
        return self._told.calls

    def read(self, text: str) -> list[CallDelta]:
        for character in text:
            if self._named and (self._at.depth > 0 or character == "{"):
                self._argument(character)
            else:
                self._outside(character)
        return self._told.fresh()

    def _argument(self, character: str) -> None:
        self._at.take(character)
        self._told.arguments(character)
        self._named, self._seen = self._at.depth > 0, ""

    def _outside(self, character: str) -> None:
        self._seen += character
        _, found, name = self._seen.partition(self._before)
        if found and character in "[{" and name[:-1].strip():
            self._told.name(name[:-1].strip())
            self._named, self._seen = True, ""
            if character == "{":
                self._argument(character)


def reader(bracketed: bool, before: str) -> Reader:
    """A reader of calls that are objects, or that are `bracketed` and begin with `before`."""
    return BracketReader(before) if bracketed else ObjectReader()
