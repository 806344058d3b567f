"""The chunk grammar: stored chunks to `chat.completion.chunk` objects, and those to a completion.

Follows the reference's sections 3.1 to 3.5, 3.8, 3.9 and 3.11. Pure: the same rows yield the same
objects, so a replay is the same bytes. Knows nothing of SQL, HTTP, tokens' ids or of how a model
writes its calls.
"""

import hashlib
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of one completion repeats; `created` is in Unix seconds.

    `service_tier` is what the request asked for, None if it did not: the answer is always
    `default`. `calls` says in which form calls are told: `tools`, or the deprecated `function`.
    `warnings` say what of the request could not be kept to; they are the key `warnings` of every
    chunk and of the completion, which the hosted API does not have, and absent if there are none.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    service_tier: str | None = None
    include_usage: bool = False
    logprobs: bool = False
    calls: str = "tools"
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """What one flush stored of one choice; `logprobs` are the API's entries of its tokens.

    `calls` come after the text: {index, name, arguments: ""} opens a call, {index, arguments}
    goes on with it.
    """

    choice: int
    token_start: int
    n_tokens: int
    text: str
    logprobs: list[Json] | None = None
    calls: list[Json] | None = None


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """Why a choice ended: `stop`, `length`, `tool_calls` or `function_call`."""

    choice: int
    finish_reason: str


def completion_id(request_id: int, job_id: str = "") -> str:
    """`chatcmpl-` and 29 letters and digits, a pure function of the ids."""
    return f"chatcmpl-{_letters(f'{job_id} {request_id}', 29)}"


def call_id(completion: str, choice: int, index: int) -> str:
    """`call_` and 24 letters and digits, a pure function of the completion's id and the place."""
    return f"call_{_letters(f'{completion} {choice} {index}', 24)}"


def _letters(of: str, count: int) -> str:
    digest = hashlib.blake2b(of.encode(), digest_size=32).digest()
    number, letters = int.from_bytes(digest, "big"), ""
    for _ in range(count):
        number, digit = divmod(number, len(_ALPHABET))
        letters += _ALPHABET[digit]
    return letters


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

    New indices appear in ascending order from 0: what a choice says waits until those before it
    have said something. Then every end in order of its choice; then `usage`, if it is known and
    the envelope includes it. A choice without an end gets no final chunk: it is still running.
    Whoever reads a request that runs hands in an iterator that ends when the request does.
    """
    told = Telling(envelope)
    for chunk in chunks:
        yield from told.chunk(chunk)
    yield from told.rest()
    for end in sorted(ends, key=lambda end: end.choice):
        yield from told.end(end)
    if envelope.include_usage and usage is not None:
        yield _chunk(envelope, []) | {"usage": dict(usage)}


@dataclass(slots=True)
class Telling:
    """How far the telling of one request is; `stream` for who gets its chunks one by one.

    `opened` choices have a role; `waiting` holds what later ones have said; `entries` are
    log-prob entries of a choice that wait for its next text.
    """

    envelope: Envelope
    opened: int = 0
    waiting: dict[int, list[Json]] = field(default_factory=dict)
    entries: dict[int, list[Json]] = field(default_factory=dict)

    def chunk(self, chunk: StoredChunk) -> Iterator[Json]:
        """What one stored chunk lets be told, of its choice and of those that waited for it."""
        said = list(self._said(chunk))
        if not said:
            return
        if chunk.choice < self.opened:
            yield from said
            return
        self.waiting.setdefault(chunk.choice, []).extend(said)
        while self.opened in self.waiting:
            yield from self._open()

    def rest(self) -> Iterator[Json]:
        """What waited for a choice that has said nothing up to the end."""
        while self.waiting:
            yield from self._open()

    def end(self, end: ChoiceEnd) -> Iterator[Json]:
        """The last chunk of a choice."""
        while self.opened <= end.choice:
            yield from self._open()
        entries = self.entries.pop(end.choice, None)
        yield self._choice(end.choice, {}, entries, end.finish_reason)

    def _open(self) -> Iterator[Json]:
        """The role of the next choice, which a call brings along and a text does not."""
        index, self.opened = self.opened, self.opened + 1
        said = self.waiting.pop(index, [])
        if said and "content" not in (choice := said[0]["choices"][0])["delta"]:
            refusal = {"refusal": None} if self.envelope.calls == "tools" else {}
            opening = {"role": "assistant", "content": None}
            choice["delta"] = opening | choice["delta"] | refusal
        else:
            opening = {"role": "assistant", "content": "", "refusal": None}
            yield self._choice(index, opening, [])
        yield from said

    def _said(self, chunk: StoredChunk) -> Iterator[Json]:
        entries = self.entries.pop(chunk.choice, []) + list(chunk.logprobs or [])
        if chunk.text:
            yield self._choice(chunk.choice, {"content": chunk.text}, entries)
        elif entries:
            self.entries[chunk.choice] = entries
        for call in chunk.calls or ():
            for delta in self._call(chunk.choice, call):
                yield self._choice(chunk.choice, delta, None)

    def _call(self, choice: int, call: Mapping[str, Any]) -> Iterator[Json]:
        """The header of a call where it has a name, then its arguments where it has some."""
        index, header = call["index"], {"name": call.get("name"), "arguments": ""}
        arguments = {"arguments": call["arguments"]}
        if self.envelope.calls == "tools":
            id = call_id(self.envelope.id, choice, index)
            opens = {"index": index, "id": id, "type": "function", "function": header}
            goes_on = {"index": index, "function": arguments}
            header, arguments = {"tool_calls": [opens]}, {"tool_calls": [goes_on]}
        else:
            header, arguments = {"function_call": header}, {"function_call": arguments}
        if call.get("name") is not None:
            yield header
        if call["arguments"]:
            yield arguments

    def _choice(
        self, index: int, delta: Json, entries: list[Json] | None, reason: str | None = None
    ) -> Json:
        reported = self.envelope.logprobs and entries is not None
        logprobs = {"content": entries, "refusal": None} if reported else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return _chunk(self.envelope, [choice])


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
        **({"warnings": list(envelope.warnings)} if envelope.warnings else {}),
    }


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
    optional: Json = {key: head[key] for key in ("service_tier", "warnings") if key in head}
    return {
        "id": head["id"],
        "object": "chat.completion",
        "created": head["created"],
        "model": head["model"],
        "choices": [_finished(choices[index]) for index in sorted(choices)],
        "usage": usage,
        "system_fingerprint": head["system_fingerprint"],
        **optional,
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
