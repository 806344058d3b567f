"""The chunk grammar: stored chunks to `chat.completion.chunk` objects, and those to a completion.

Follows the reference's sections 3.1 to 3.4, 3.8, 3.9 and 3.11. Pure: the same rows yield the same
objects, so a replay is the same bytes. Knows nothing of SQL, HTTP or tokens' ids.
"""

import hashlib
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of one completion repeats; `created` is in Unix seconds.

    `service_tier` is what the request asked for, None if it did not: the answer is always
    `default`.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    service_tier: str | None = None
    include_usage: bool = False
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """What one flush stored of one choice; `logprobs` are the API's entries of its tokens."""

    choice: int
    token_start: int
    n_tokens: int
    text: str
    logprobs: list[Json] | None = None


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """Why a choice ended: `stop` or `length`."""

    choice: int
    finish_reason: str


def completion_id(request_id: int, job_id: str = "") -> str:
    """`chatcmpl-` and 29 letters and digits, a pure function of the ids."""
    digest = hashlib.blake2b(f"{job_id} {request_id}".encode(), digest_size=32).digest()
    number, letters = int.from_bytes(digest, "big"), ""
    for _ in range(29):
        number, digit = divmod(number, len(_ALPHABET))
        letters += _ALPHABET[digit]
    return f"chatcmpl-{letters}"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Json:
    """The usage object; `completion_tokens` is the sum over choices."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def stream(
    envelope: Envelope,
    chunks: Iterable[StoredChunk],
    ends: Iterable[ChoiceEnd],
    usage: Mapping[str, Any] | None = None,
) -> Iterator[Json]:
    """The `chat.completion.chunk` objects of one request, in the order of `chunks`.

    New indices appear in ascending order from 0, each opened by its role; then every end in
    order of its choice; then `usage`, if it is known and the envelope includes it. A choice
    without an end gets no final chunk: it is still running.
    """
    opened = 0
    pending: dict[int, list[Json]] = {}
    for chunk in chunks:
        for index in range(opened, chunk.choice + 1):
            yield _opening(envelope, index)
        opened = max(opened, chunk.choice + 1)
        entries = pending.pop(chunk.choice, []) + list(chunk.logprobs or [])
        if chunk.text:
            yield _choice(envelope, chunk.choice, {"content": chunk.text}, entries)
        elif entries:
            pending[chunk.choice] = entries
    for end in sorted(ends, key=lambda end: end.choice):
        for index in range(opened, end.choice + 1):
            yield _opening(envelope, index)
        opened = max(opened, end.choice + 1)
        yield _choice(envelope, end.choice, {}, pending.get(end.choice), end.finish_reason)
    if envelope.include_usage and usage is not None:
        yield _chunk(envelope, []) | {"usage": dict(usage)}


def _chunk(envelope: Envelope, choices: list[Json]) -> Json:
    tier = {} if envelope.service_tier is None else {"service_tier": "default"}
    return {
        "id": envelope.id,
        "object": "chat.completion.chunk",
        "created": envelope.created,
        "model": envelope.model,
        **tier,
        "system_fingerprint": envelope.system_fingerprint,
        "choices": choices,
        **({"usage": None} if envelope.include_usage else {}),
    }


def _opening(envelope: Envelope, index: int) -> Json:
    delta = {"role": "assistant", "content": "", "refusal": None}
    return _choice(envelope, index, delta, [])


def _choice(
    envelope: Envelope,
    index: int,
    delta: Json,
    entries: list[Json] | None,
    finish_reason: str | None = None,
) -> Json:
    reported = envelope.logprobs and entries is not None
    logprobs = {"content": entries, "refusal": None} if reported else None
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
    return _chunk(envelope, [choice])


def fold(chunks: Iterable[Mapping[str, Any]]) -> Json:
    """`chat.completion.chunk` objects of one request to its `chat.completion`.

    Raises `ValueError` for no chunks at all. `usage` is null where no chunk told it.
    """
    head: Json = {}
    choices: dict[int, Json] = {}
    usage: Any = None
    for chunk in chunks:
        head = head or {**chunk}
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            _fold_choice(choices, part)
    if not head:
        raise ValueError("there are no chunks to fold")
    tier = {"service_tier": head["service_tier"]} if "service_tier" in head else {}
    return {
        "id": head["id"],
        "object": "chat.completion",
        "created": head["created"],
        "model": head["model"],
        "choices": [_finished(choices[index]) for index in sorted(choices)],
        "usage": usage,
        "system_fingerprint": head["system_fingerprint"],
        **tier,
    }


def _fold_choice(choices: dict[int, Json], part: Mapping[str, Any]) -> None:
    choice = choices.setdefault(
        part["index"],
        {
            "index": part["index"],
            "message": {"role": "assistant", "content": None, "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        },
    )
    _fold_delta(choice["message"], part["delta"])
    choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
    for key, entries in (part["logprobs"] or {}).items():
        logprobs = choice["logprobs"] = choice["logprobs"] or {"content": None, "refusal": None}
        if entries is not None:
            logprobs[key] = (logprobs[key] or []) + entries


def _fold_delta(message: Json, delta: Mapping[str, Any]) -> None:
    for key in ("content", "refusal"):
        if delta.get(key) is not None:
            message[key] = (message[key] or "") + delta[key]
    for call in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", {})
        _fold_call(calls.setdefault(call["index"], {}), call)
    if delta.get("function_call") is not None:
        _append_call(message.setdefault("function_call", {}), delta["function_call"])


def _fold_call(known: Json, call: Mapping[str, Any]) -> None:
    for key in ("id", "type"):
        if call.get(key) is not None:
            known.setdefault(key, call[key])
    _append_call(known.setdefault("function", {}), call.get("function") or {})


def _append_call(known: Json, function: Mapping[str, Any]) -> None:
    if function.get("name") is not None:
        known.setdefault("name", function["name"])
    known["arguments"] = known.get("arguments", "") + (function.get("arguments") or "")


def _finished(choice: Json) -> Json:
    message = choice["message"]
    if "tool_calls" in message:
        calls = message["tool_calls"]
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return choice
