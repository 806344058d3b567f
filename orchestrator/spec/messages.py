"""The conversation: which messages may follow which, and what each may hold.

Checks the rules of the reference's section 1.2 and joins text parts into one string. Knows
nothing of chat templates or tokens.
"""

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.spec import refusals
from orchestrator.spec.refusals import Rank, Refusal

Message = Mapping[str, object]

ROLES = ("system", "assistant", "user", "function", "tool")
_KEYS = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "refusal", "name", "tool_calls", "function_call"),
    "tool": ("role", "content", "tool_call_id"),
    "function": ("role", "content", "name"),
}
_REQUIRED = {
    "system": ("content",),
    "user": ("content",),
    "assistant": (),
    "tool": ("content", "tool_call_id"),
    "function": ("content", "name"),
}
_PARTS = {
    "system": ("text",),
    "user": ("text", "image_url"),
    "assistant": ("text", "refusal"),
    "tool": ("text",),
    "function": (),
}


def check(value: object) -> Iterator[Refusal]:
    """Every refusal of the parameter `messages`."""
    if not isinstance(value, list | tuple):
        yield refusals.wrong_type("messages", "an array of objects", value)
        return
    if not value:
        yield refusals.empty("messages")
    for position, message in enumerate(value):
        yield from _message(f"messages[{position}]", message)
    if all(isinstance(message, Mapping) for message in value):
        yield from _sequence(value)


def _message(path: str, message: object) -> Iterator[Refusal]:
    if not isinstance(message, Mapping):
        yield refusals.wrong_type(path, "an object", message)
        return
    if "role" not in message:
        yield refusals.missing(f"{path}.role")
        return
    role = message["role"]
    if not isinstance(role, str):
        yield refusals.wrong_type(f"{path}.role", "a string", role)
    elif role not in ROLES:
        yield refusals.wrong_value(f"{path}.role", ROLES, role)
    else:
        yield from refusals.keys(message, path, _KEYS[role], _REQUIRED[role])
        yield from _fields(path, role, message)


def _fields(path: str, role: str, message: Message) -> Iterator[Refusal]:
    if "content" in message or role == "assistant":
        yield from _content(path, role, message)
    if "name" in message:
        yield from refusals.name(f"{path}.name", message["name"])
    if "tool_call_id" in message:
        yield from refusals.string(f"{path}.tool_call_id", message["tool_call_id"])
    if message.get("refusal") is not None:
        yield from refusals.string(f"{path}.refusal", message["refusal"])
    if "tool_calls" in message:
        yield from _tool_calls(f"{path}.tool_calls", message["tool_calls"])
    if message.get("function_call") is not None:
        yield from _call(f"{path}.function_call", message["function_call"])


def _content(path: str, role: str, message: Message) -> Iterator[Refusal]:
    value, path = message.get("content"), f"{path}.content"
    if value is None and role == "function":
        return
    if value is None and role == "assistant":
        if not any(message.get(key) for key in ("tool_calls", "function_call", "refusal")):
            text = "Invalid value for 'content': expected a string, got null."
            yield Refusal(Rank.VALUE, text, path, None, "a string", "null")
    elif isinstance(value, list | tuple) and _PARTS[role]:
        yield from _parts(path, role, value)
    elif not isinstance(value, str):
        kind = "one of a string or array of objects" if _PARTS[role] else "a string"
        yield refusals.wrong_type(path, kind, value, "a string or a list of parts")


def _parts(path: str, role: str, parts: Sequence[object]) -> Iterator[Refusal]:
    if not parts:
        yield refusals.empty(path)
    for position, part in enumerate(parts):
        yield from _part(f"{path}[{position}]", role, part)
    kinds = [part.get("type") for part in parts if isinstance(part, Mapping)]
    if "refusal" in kinds and len(kinds) > 1:
        yield refusals.too_long(path, 1, len(parts))


def _part(path: str, role: str, part: object) -> Iterator[Refusal]:
    if not isinstance(part, Mapping):
        yield refusals.wrong_type(path, "an object", part)
        return
    kind = part.get("type")
    if "type" not in part:
        yield refusals.missing(f"{path}.type")
    elif kind not in _PARTS[role]:
        yield refusals.wrong_value(f"{path}.type", _PARTS[role], kind)
    elif kind == "image_url":
        text = "Invalid content type. image_url is only supported by certain models."
        yield Refusal(Rank.VALUE, text, f"{path}.type", None, "'text'", "'image_url'")
    else:
        field = str(kind)
        yield from refusals.keys(part, path, ("type", field), (field,))
        if field in part:
            yield from refusals.string(f"{path}.{field}", part[field])


def _tool_calls(path: str, calls: object) -> Iterator[Refusal]:
    if not isinstance(calls, list | tuple):
        yield refusals.wrong_type(path, "an array of objects", calls)
        return
    if not calls:
        yield refusals.empty(path)
    for position, call in enumerate(calls):
        yield from _tool_call(f"{path}[{position}]", call)


def _tool_call(path: str, call: object) -> Iterator[Refusal]:
    if not isinstance(call, Mapping):
        yield refusals.wrong_type(path, "an object", call)
        return
    fields = ("id", "type", "function")
    yield from refusals.keys(call, path, fields, fields)
    if "id" in call:
        yield from refusals.string(f"{path}.id", call["id"])
    if call.get("type", "function") != "function":
        yield refusals.wrong_value(f"{path}.type", ("function",), call["type"])
    if "function" in call:
        yield from _call(f"{path}.function", call["function"])


def _call(path: str, call: object) -> Iterator[Refusal]:
    if not isinstance(call, Mapping):
        yield refusals.wrong_type(path, "an object", call)
        return
    yield from refusals.keys(call, path, ("name", "arguments"), ("name", "arguments"))
    if "name" in call:
        yield from refusals.name(f"{path}.name", call["name"])
    if "arguments" in call:
        yield from refusals.string(f"{path}.arguments", call["arguments"])


def _sequence(value: Sequence[Message]) -> Iterator[Refusal]:
    """Each call is answered by one tool message before any other role speaks."""
    open_ids: list[object] = []
    caller = 0
    for position, message in enumerate(value):
        if message.get("role") == "tool":
            if message.get("tool_call_id") not in open_ids:
                yield _orphan(position)
            else:
                open_ids.remove(message.get("tool_call_id"))
            continue
        if open_ids:
            yield _unanswered(caller, open_ids)
        calls = message.get("tool_calls") if message.get("role") == "assistant" else None
        calls = calls if isinstance(calls, list | tuple) else ()
        open_ids = [call.get("id") for call in calls if isinstance(call, Mapping)]
        caller = position
    if open_ids:
        yield _unanswered(caller, open_ids)


def _orphan(position: int) -> Refusal:
    text = (
        "Invalid parameter: messages with role 'tool' must be a response to a preceeding "
        "message with 'tool_calls'."
    )
    plain = "a tool message after the assistant message whose 'tool_calls' it answers"
    return Refusal(Rank.SEQUENCE, text, f"messages.[{position}].role", None, plain, "none before")


def _unanswered(position: int, ids: Sequence[object]) -> Refusal:
    told = ", ".join(map(str, ids))
    text = (
        "An assistant message with 'tool_calls' must be followed by tool messages responding to "
        "each 'tool_call_id'. The following tool_call_ids did not have response messages: "
        f"{told}"
    )
    plain = "one tool message for each of its 'tool_calls'"
    return Refusal(
        Rank.SEQUENCE, text, f"messages.[{position}].role", None, plain, f"none for {told}"
    )


def mention(value: object, word: str) -> bool:
    """Whether any message's text holds `word`, in upper or lower case; wrong shapes hold none."""
    messages = value if isinstance(value, list | tuple) else ()
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    texts = contents + [part.get("text") for part in parts if isinstance(part, Mapping)]
    return any(isinstance(text, str) and word in text.lower() for text in texts)


def joined(value: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with text parts joined without a separator; all else as received."""
    return tuple(
        {**message, "content": _text(message["content"])} if "content" in message else dict(message)
        for message in value
    )


def _text(content: object) -> object:
    if not isinstance(content, list | tuple):
        return content
    return "".join(str(part[part["type"]]) for part in content)
