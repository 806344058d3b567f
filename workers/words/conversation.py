"""Messages and tools in the form that chat templates are written for.

The API has more forms than templates know: content in parts, calls whose arguments are text, the
older `functions` with `function_call` and the role `function`. Here they become the one form of
docs/chat-completions-streaming.md sections 6 and 8. Pure; knows nothing of templates but whether
they insist on ids of nine characters.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import RequestError

Json = dict[str, Any]
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def to_messages(messages: Sequence[Mapping[str, Any]], *, short_ids: bool = False) -> list[Json]:
    """Parts joined, arguments as objects, `function_call` and role `function` as today's calls.

    With `short_ids` the ids of calls become nine letters and digits, on both sides alike. A key
    that is null is left out, as transformers does: many templates print "None", or ask only
    whether the key is there. All else stays as it is. Raises RequestError `unsupported_content`
    for a part that is not text.
    """
    plain = [_parts_joined(message, at) for at, message in enumerate(messages)]
    plain = _with_tool_calls(plain)
    for message in plain:
        if message.get("tool_calls"):
            message["tool_calls"] = [_call(call, short_ids) for call in message["tool_calls"]]
        if short_ids and isinstance(message.get("tool_call_id"), str):
            message["tool_call_id"] = _short(message["tool_call_id"])
    return plain


def to_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Json] | None:
    """`tools`, or the older `functions`, as tools; None where there is none.

    Absent parameters are those of a function that takes none, as the API says: some templates
    read into them.
    """
    return [_tool(tool) for tool in tools] if tools else None


def _tool(tool: Mapping[str, Any]) -> Json:
    function = dict(tool.get("function", tool))
    if function.get("parameters") is None:
        function["parameters"] = {"type": "object", "properties": {}}
    return {**tool, "function": function} if "function" in tool else _as_tool(function)


def _as_tool(function: Json) -> Json:
    return {"type": "function", "function": function}


def _parts_joined(message: Mapping[str, Any], at: int) -> Json:
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list):
        parts = enumerate(plain["content"])
        plain["content"] = "".join(_text(part, f"messages[{at}].content[{i}]") for i, part in parts)
    return plain


def _text(part: Mapping[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise RequestError("unsupported_content", f"{where}: expected text, got {kind!r}")
    return str(part[kind])


def _with_tool_calls(messages: list[Json]) -> list[Json]:
    """`function_call` as the only tool call; role `function` as the answer to the call before.

    Such a call has no id: it gets one of nine digits and letters, which every template takes.
    """
    changed, asked = [], ("", "")
    for at, message in enumerate(messages):
        id = f"call{at:05d}"
        if "function_call" in message:
            call = message.pop("function_call")
            asked = str(call.get("name")), id
            message.setdefault("tool_calls", [{"id": id, **_as_tool(call)}])
        elif message.get("role") == "function":
            name, before = asked
            id = before if name == message.get("name") else id
            content = message.get("content") or ""
            message = {**message, "role": "tool", "tool_call_id": id, "content": content}
        changed.append(message)
    return changed


def _call(call: Mapping[str, Any], short_ids: bool) -> Json:
    """Arguments are parsed because templates apply `tojson` to them; broken ones stay text."""
    plain = dict(call)
    if isinstance(call.get("function"), Mapping):
        arguments = call["function"].get("arguments")
        plain["function"] = {**call["function"], "arguments": _arguments(arguments)}
    if short_ids and isinstance(call.get("id"), str):
        plain["id"] = _short(call["id"])
    return plain


def _arguments(text: object) -> object:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _short(id: str) -> str:
    """Nine letters and digits for an id: itself if it is so, else from its hash."""
    if _SHORT_ID.fullmatch(id):
        return id
    number = int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogatepass")).digest(), "big")
    return "".join(_ALPHABET[number // 62**place % 62] for place in range(9))
