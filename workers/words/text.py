"""A choice's tokens to safe text: whole characters, cut before a stop string, one token at a time.

Knows nothing of sampling or of how a model writes calls of tools; `CallDelta` and `Call` are only
the form in which they are told.

Text is the UTF-8 decoding of all tokens' bytes together, with one U+FFFD for each sequence that
cannot be completed.
"""

import codecs
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from workers.words.tokenizer import LogprobEntry as LogprobEntry
from workers.words.tokenizer import Tokenizer, shown


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as far as it is written; `arguments` is its JSON text exactly as generated."""

    name: str
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of call number `index`: its name, told once and first, or a piece of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Emitted:
    """What one token, or the end of the text, released.

    `calls` are the parts of tool calls that became certain, in order. `text` may be "" beside
    entries in `logprobs` only when the text has ended (`stopped`, or from `finish`) or a call has
    opened: then they are of tokens cut in their middle, or of tokens without text.
    """

    text: str = ""
    logprobs: list[LogprobEntry] = field(default_factory=list)
    stopped: bool = False
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A log-probability entry whose token's text is not emitted yet."""

    start: int  # the character that holds the token's first byte
    end: int  # the character that holds its last byte
    entry: LogprobEntry

    def without(self, begin: int, end: int) -> "_Waiting | None":
        """Its place when the characters [begin, end) are gone; None if it lay in them."""
        if begin <= self.start and self.end < end:
            return None
        start = self.start if self.start < begin else max(self.start - (end - begin), begin)
        last = self.end if self.end < begin else max(self.end - (end - begin), begin - 1)
        return _Waiting(start, last, self.entry)


class TextStream:
    """One choice's text as its tokens come; a function of the tokens pushed, so replay resumes it.

    Held back are the bytes of an incomplete character and whatever may become a stop string; the
    entry of a token leaves with the piece that carries the token's last byte. At the end of a
    piece no character is ever taken back. A special token is no text, unless `spelled` has bytes
    for it; what is spelled as one of `silent` is none either, wherever it stands.
    """

    calls: tuple[Call, ...] = ()

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...] = (),
        spelled: Mapping[int, bytes] | None = None,
        silent: tuple[str, ...] = (),
    ) -> None:
        self._tokenizer, self._stops, self._spelled = tokenizer, stops, spelled or {}
        self._silent = silent
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lead = tokenizer.lead
        self._decoded = self._emitted = 0  # characters
        self._held = ""  # decoded, not emitted
        self._pieces: list[str] = []
        self._waiting: deque[_Waiting] = deque()
        self._stopped = False

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._pieces)

    @property
    def rest(self) -> str:
        """What is decoded and not emitted: after a stop, the stop string and what followed it."""
        return self._held

    @property
    def dangling(self) -> bytes:
        """The bytes after it, which are no whole character yet."""
        return self._decoder.getstate()[0]

    def push(self, token: int, logprob: LogprobEntry | None = None) -> Emitted:
        """Take a token and its entry; release what is certain. EOS is not pushed."""
        if self._stopped:
            raise ValueError("the text has ended before a stop string")
        data = self._spelled.get(token) or self._tokenizer.token_bytes(token)
        kept, self._lead = self._lead.cut(data)
        start, end = self._feed(kept[:1]), self._feed(kept[1:])
        if logprob is not None:
            if kept != data:  # the entries' bytes are those of the text
                logprob = logprob | {"token": shown(kept), "bytes": list(kept)}
            self._waiting.append(_Waiting(start, end, logprob))
        self._silence()
        certain = len(self._held) - _held_back(self._held, self._stops + self._silent)
        return self._stop() or self._release(certain)

    def finish(self) -> Emitted:
        """Release all that is held, a dangling sequence as one U+FFFD; it may complete a stop."""
        if self._stopped:
            return Emitted(stopped=True)
        self._feed(b"", final=True)
        return self._stop() or self._release(len(self._held), final=True)

    def _feed(self, data: bytes, final: bool = False) -> int:
        """Decode; the index of the character that holds the last byte fed so far."""
        piece = self._decoder.decode(data, final)
        self._held += piece
        self._decoded += len(piece)
        # Bytes of an incomplete character are one prefix of one: they end up in one character,
        # the next, be it their own or U+FFFD.
        return self._decoded + bool(self._decoder.getstate()[0]) - 1

    def _silence(self) -> None:
        """Take out what is no text, and the entries of the tokens that lie wholly in it."""
        for word in self._silent:
            while (at := self._held.find(word)) >= 0:
                self._held = self._held[:at] + self._held[at + len(word) :]
                self._decoded -= len(word)
                begin = self._emitted + at
                cut = (each.without(begin, begin + len(word)) for each in self._waiting)
                self._waiting = deque(each for each in cut if each is not None)

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
