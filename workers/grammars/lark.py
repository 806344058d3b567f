"""What a completion must look like, written as a grammar in llguidance's form of Lark.

Strings only: knows nothing of tokens, and does not know whether a grammar compiles.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from workers.words.calls import CallFormat

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
NO_ARGUMENTS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python's json.dumps writes, and as models write calls; no other white space is possible."""


def grammar(
    schema: Mapping[str, Any] | None,
    form: CallFormat | None,
    functions: Sequence[tuple[str, Mapping[str, Any]]],
    parallel: bool,
    spaced: bool,
) -> str:
    """Content by `schema`, calls in `form`, or either: what is not None.

    Calls are one, or if `parallel` one or more, of the named functions with arguments by schema.
    """
    rules = [] if schema is None else [f"json: {_json(schema)}"]
    rules += [] if form is None else _call_rules(form, functions, parallel)
    starts = ["json"] * (schema is not None) + ["calls"] * (form is not None)
    # Without no_forcing a mask offers only one spelling in tokens where the text is determined,
    # and a vocabulary's own ways (a word start before each text) can make that one impossible.
    head = ['%llguidance {"no_forcing": true}', f"start: {_space(spaced)}({' | '.join(starts)})"]
    return "\n".join([*head, *rules])


def arguments_schema(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The schema of a function's arguments, which are an object always.

    ValueError if `parameters` asks for something else.
    """
    if parameters is None:
        return NO_ARGUMENTS
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ValueError(f"arguments are an object, and its type is {json.dumps(kind)}")
    return {**parameters, "type": "object"}


def _space(allowed: bool) -> str:
    return '" "? ' if allowed else ""


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _JSON})


def _call_rules(
    form: CallFormat, functions: Sequence[tuple[str, Mapping[str, Any]]], parallel: bool
) -> list[str]:
    syntax = form.syntax
    more = f"({_text(syntax.joint)} call)*" if parallel else ""
    begin = ""
    if not syntax.before.startswith(syntax.opening):
        optional = "?" if syntax.bare and not form.exclusive else ""
        begin = f'({_text(syntax.opening)} " "?){optional}'
    rules = [f"calls: {begin} {_text(syntax.head)} call {more} {_text(syntax.tail)}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, (name, schema) in enumerate(functions):
        head = syntax.before + (json.dumps(name) if syntax.quoted else name) + syntax.between
        rules.append(f"call_{i}: {_text(head)} arguments_{i} {_text(syntax.after)}")
        rules.append(f"arguments_{i}: {_json(schema)}")
    return rules


def _text(text: str) -> str:
    return json.dumps(text) if text else ""
