"""Text to token ids, and token ids to their bytes.

Knows nothing of jobs, chat templates or sampling. The only file that imports `tokenizers`.

A token is its bytes; text is the UTF-8 decoding of all bytes together, with one U+FFFD for each
sequence that cannot be completed. Byte-level BPE and SentencePiece-like vocabularies (with or
without byte fallback) are known by the decoder named in `tokenizer.json`; others are refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
        self.lead = decoder.lead
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
        lead, pieces = self.lead, []
        for id in ids:
            piece, lead = lead.cut(self._bytes[id])
            pieces.append(piece)
        return b"".join(pieces).decode("utf-8", "replace")

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


@dataclass(frozen=True, slots=True)
class Lead:
    """What a decoder takes from the beginning of a text."""

    spaces: int = 0  # so many leading spaces of the text
    word_starts: bool = False  # every word start of the first token

    def cut(self, data: bytes) -> tuple[bytes, "Lead"]:
        """The next token's bytes without it, and what is to be taken from the token after."""
        if not data or not (self.spaces or self.word_starts):
            return data, self
        rest, spaces = data.replace(b" ", b"") if self.word_starts else data, self.spaces
        while spaces and rest.startswith(b" "):
            rest, spaces = rest[1:], spaces - 1
        return rest, Lead(0 if rest else spaces)


@dataclass(frozen=True, slots=True)
class _Decoder:
    """How `tokenizer.json` turns tokens into text, as far as a single token tells."""

    byte_level: bool
    byte_fallback: bool
    lead: Lead

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
        return cls("ByteLevel" in kinds, "ByteFallback" in kinds, Lead(spaces, prepends))

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
        return {"token": shown(data), "logprob": logprob, "bytes": list(data)}
    return {"token": tokenizer.token(token), "logprob": logprob, "bytes": None}


def shown(data: bytes) -> str:
    """The token as text, bytes that are none on their own as `\\\\xf0`."""
    return data.decode("utf-8", "backslashreplace")
