"""Text to token ids, and token ids to safe text, byte-exactly and one token at a time.

Knows nothing of jobs, chat templates or sampling. The only file that imports `tokenizers`.

A token is its bytes; text is the UTF-8 decoding of all bytes together, with one U+FFFD for each
sequence that cannot be completed. Byte-level BPE and SentencePiece-like vocabularies (with or
without byte fallback) are known by the decoder named in `tokenizer.json`; others are refused.
"""

import codecs
import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers

from orchestrator.errors import RequestError, WorkerError

LogprobEntry: TypeAlias = dict[str, Any]
"""`{"token", "logprob", "bytes", "top_logprobs"}` of chat-completions-streaming.md section 3.8."""

_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """The tokenizer of a model's folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Read `folder/tokenizer.json`; WorkerError `model` if it is missing or unknown in kind."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise WorkerError("model", f"{folder}: no tokenizer.json")
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
            spec = json.loads(self._inner.to_str())  # in the newest form, whatever the file's
        except Exception as error:  # the library raises nothing narrower
            raise WorkerError("model", f"{path}: not a tokenizer: {error}") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        decoder = _Decoder.of(spec.get("decoder"), path)
        self._lead = decoder.lead
        self._bytes = _bytes_by_id(self._inner, decoder)
        self._specials = frozenset(
            id for id, token in self._inner.get_added_tokens_decoder().items() if token.special
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, adding none; special tokens written in it become their ids."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError("invalid_text", f"the text is not valid Unicode: {error}") from error
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` as a text of their own; special tokens have none."""
        stream = self.stream()
        pieces = [stream.push(id).text for id in ids]
        return "".join([*pieces, stream.finish().text])

    def token_bytes(self, id: int) -> bytes:
        """The bytes `id` stands for inside a text; b"" for a special token."""
        return self._bytes[id]

    def token_id(self, token: str) -> int | None:
        """The id of the token spelled exactly `token` in the vocabulary."""
        id: int | None = self._inner.token_to_id(token)
        return id

    def token(self, id: int) -> str:
        """How the vocabulary spells `id`; "" for an id it leaves out."""
        return self._inner.id_to_token(id) or ""

    def is_special(self, id: int) -> bool:
        return id in self._specials

    def to_json(self) -> str:
        """The whole tokenizer, for a fingerprint or a grammar engine."""
        return str(self._inner.to_str())

    def stream(self, stops: tuple[str, ...] = ()) -> "TextStream":
        """A new text, to be cut before the first of `stops`."""
        return TextStream(self, stops, self._lead)


@dataclass(frozen=True, slots=True)
class _Lead:
    """What a decoder takes from the beginning of a text."""

    spaces: int = 0  # so many leading spaces of the text
    word_starts: bool = False  # every word start of the first token


@dataclass(frozen=True, slots=True)
class _Decoder:
    """How `tokenizer.json` turns tokens into text, as far as a single token tells."""

    byte_level: bool
    byte_fallback: bool
    lead: _Lead

    @classmethod
    def of(cls, spec: dict[str, Any] | None, path: Path) -> "_Decoder":
        steps = _steps(spec)
        kinds = {str(step.get("type")) for step in steps}
        unknown = [step for step in steps if not _is_known(step)]
        if unknown or not kinds & {"ByteLevel", "Metaspace", "Replace"}:
            what = json.dumps(unknown[0] if unknown else spec)
            raise WorkerError("model", f"{path}: decoder {what} is not supported")
        spaces = sum(step["start"] for step in steps if step["type"] == "Strip")
        prepends = any(
            step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
            for step in steps
        )
        return cls("ByteLevel" in kinds, "ByteFallback" in kinds, _Lead(spaces, prepends))

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:
                return token.encode()
        if self.byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(_WORD_START, " ").encode()


def _steps(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [step for inner in spec["decoders"] for step in _steps(inner)]
    return [spec]


def _is_known(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "ByteLevel" | "ByteFallback" | "Fuse"}:
            return True
        case {"type": "Metaspace"}:
            return bool(step.get("replacement", _WORD_START) == _WORD_START)
        case {"type": "Replace", "pattern": {"String": pattern}, "content": " "}:
            return bool(pattern == _WORD_START)
        case {"type": "Strip", "content": " ", "stop": 0}:
            return True
    return False


def _byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's map of bytes to printable characters (`bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _byte_of_character()


def _bytes_by_id(inner: tokenizers.Tokenizer, decoder: _Decoder) -> list[bytes]:
    """The bytes of each id; an id the vocabulary leaves out has none."""
    vocabulary = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, id in vocabulary.items():
        table[id] = decoder.bytes_of(token)
    for id, added in inner.get_added_tokens_decoder().items():
        plain = added.content if decoder.byte_level else added.content.replace(_WORD_START, " ")
        table[id] = b"" if added.special else plain.encode()
    return table


def logprob_entry(
    tokenizer: Tokenizer, token: int, logprob: float, top: Sequence[tuple[int, float]]
) -> LogprobEntry:
    """The API's entry for a sampled token and its most probable rivals."""
    rivals = [_logprob(tokenizer, *rival) for rival in top]
    return _logprob(tokenizer, token, logprob) | {"top_logprobs": rivals}


def _logprob(tokenizer: Tokenizer, token: int, logprob: float) -> LogprobEntry:
    data = tokenizer.token_bytes(token)
    if data:
        return {"token": _shown(data), "logprob": logprob, "bytes": list(data)}
    return {"token": tokenizer.token(token), "logprob": logprob, "bytes": None}


def _shown(data: bytes) -> str:
    """The token as text, bytes that are none on their own as `\\\\xf0`."""
    return data.decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Emitted:
    """What one token, or the end of the text, released.

    `text` may be "" beside entries in `logprobs` only when the text has ended (`stopped`, or from
    `finish`): then they are of tokens cut in their middle, or of tokens without text.
    """

    text: str = ""
    logprobs: list[LogprobEntry] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A log-probability entry whose token's text is not emitted yet."""

    start: int  # the character that holds the token's first byte
    end: int  # the character that holds its last byte
    entry: LogprobEntry


class TextStream:
    """One choice's text as its tokens come; a function of the tokens pushed, so replay resumes it.

    Held back are the bytes of an incomplete character and whatever may become a stop string; the
    entry of a token leaves with the piece that carries the token's last byte. At the end of a
    piece no character is ever taken back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], lead: "_Lead") -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces, self._word_starts = lead.spaces, lead.word_starts
        self._decoded = self._emitted = 0  # characters
        self._held = ""  # decoded, not emitted
        self._pieces: list[str] = []
        self._waiting: deque[_Waiting] = deque()
        self._stopped = False

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._pieces)

    def push(self, token: int, logprob: LogprobEntry | None = None) -> Emitted:
        """Take a token and its entry; release what is certain. EOS is not pushed."""
        if self._stopped:
            raise ValueError("the text has ended before a stop string")
        data = self._tokenizer.token_bytes(token)
        kept = self._without_lead(data)
        start, end = self._feed(kept[:1]), self._feed(kept[1:])
        if logprob is not None:
            if kept != data:  # the entries' bytes are those of the text
                logprob = logprob | {"token": _shown(kept), "bytes": list(kept)}
            self._waiting.append(_Waiting(start, end, logprob))
        return self._stop() or self._release(len(self._held) - _held_back(self._held, self._stops))

    def finish(self) -> Emitted:
        """Release all that is held, a dangling sequence as one U+FFFD; it may complete a stop."""
        if self._stopped:
            return Emitted(stopped=True)
        self._feed(b"", final=True)
        return self._stop() or self._release(len(self._held), final=True)

    def _without_lead(self, data: bytes) -> bytes:
        if not data:
            return data
        if self._word_starts:
            self._word_starts = False
            data = data.replace(b" ", b"")
        while self._spaces and data.startswith(b" "):
            self._spaces -= 1
            data = data[1:]
        if data:
            self._spaces = 0
        return data

    def _feed(self, data: bytes, final: bool = False) -> int:
        """Decode; the index of the character that holds the last byte fed so far."""
        piece = self._decoder.decode(data, final)
        self._held += piece
        self._decoded += len(piece)
        # Bytes of an incomplete character are one prefix of one: they end up in one character,
        # the next, be it their own or U+FFFD.
        return self._decoded + bool(self._decoder.getstate()[0]) - 1

    def _stop(self) -> Emitted | None:
        """End the text where a stop string occurs; the earliest start wins."""
        starts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not starts:
            return None
        self._stopped = True
        text = self._emit(min(starts))
        entries = [each.entry for each in self._waiting if each.start < self._emitted]
        return Emitted(text, entries, stopped=True)

    def _release(self, size: int, final: bool = False) -> Emitted:
        text = self._emit(size)
        entries = []
        while self._waiting and (final or (text and self._waiting[0].end < self._emitted)):
            entries.append(self._waiting.popleft().entry)
        return Emitted(text, entries)

    def _emit(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        self._emitted += size
        self._pieces.append(text)
        return text


def _held_back(text: str, stops: tuple[str, ...]) -> int:
    """The length of the longest end of `text` that begins a stop string, `text` holding none."""
    longest = 0
    for stop in stops:
        at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while at >= 0 and not stop.startswith(text[at:]):
            at = text.find(stop[0], at + 1)
        if at >= 0:
            longest = max(longest, len(text) - at)
    return longest
