"""How a model writes calls of tools: known from its chat template, split from text as tokens come.

Knows nothing of schemas, grammars or sampling. A family's form (`Syntax`) is written and read in
one way only, the model's native one; docs/chat-completions-streaming.md section 6.
"""

import codecs
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import WorkerError
from workers.words.readers import Reader, reader
from workers.words.text import Call, Emitted, TextStream
from workers.words.tokenizer import LogprobEntry, Tokenizer


@dataclass(frozen=True, slots=True)
class Syntax:
    """A list of calls: `head` call (`joint` call)* `tail`, after the opening if no call has it.

    A call is `before` name `between` arguments `after`, the name in quotes if `quoted`. `opening`
    begins the first one, wherever in the text; a line break just before it belongs to it. If
    `bare`, a text that starts with a brace is a call too, and the opening may be left out.
    `markers` may be special tokens.
    """

    opening: str
    markers: tuple[str, ...]
    before: str
    between: str
    after: str
    head: str = ""
    joint: str = ""
    tail: str = ""
    quoted: bool = True
    bare: bool = False


_HERMES = Syntax(
    opening="<tool_call>",
    markers=("<tool_call>", "</tool_call>"),
    before='<tool_call>\n{"name": ',
    between=', "arguments": ',
    after="}\n</tool_call>",
    joint="\n",
)
_LLAMA3 = Syntax(
    opening="<|python_tag|>",
    markers=("<|python_tag|>",),
    before='{"name": ',
    between=', "parameters": ',
    after="}",
    joint="; ",
    bare=True,
)
_MISTRAL = Syntax(
    opening="[TOOL_CALLS]",
    markers=("[TOOL_CALLS]",),
    before='{"name": ',
    between=', "arguments": ',
    after="}",
    head="[",
    joint=", ",
    tail="]",
)
_MISTRAL_ARGS = Syntax(
    opening="[TOOL_CALLS]",
    markers=("[TOOL_CALLS]", "[ARGS]"),
    before="[TOOL_CALLS]",
    between="[ARGS]",
    after="",
    quoted=False,
)
SYNTAXES: Mapping[str, Syntax] = {
    "hermes": _HERMES,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "mistral-args": _MISTRAL_ARGS,
}


@dataclass(frozen=True, slots=True)
class CallFormat:
    """The native form of a model's calls, by the name of its family.

    `exclusive`: a text is wholly content or wholly calls, and its beginning decides (as where
    content is JSON by a schema: what looks like a marker inside of it is none).
    """

    name: str
    exclusive: bool = False

    @classmethod
    def of(cls, folder: Path, template_source: str) -> "CallFormat | None":
        """What `penstock.json` in `folder` says (`{"tool_format": ...}`), else what the template
        shows; None: no known form. WorkerError `model` if the file names an unknown one.
        """
        path = folder / "penstock.json"
        if not path.is_file():
            return _detected(template_source)
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WorkerError("model", f"{path}: not JSON: {error}") from error
        if not isinstance(settings, dict) or "tool_format" not in settings:
            return _detected(template_source)
        name = settings["tool_format"]
        if name is None:
            return None
        if not isinstance(name, str) or name not in SYNTAXES:
            known = ", ".join(SYNTAXES)
            raise WorkerError("model", f"{path}: tool_format: expected {known}, got {name!r}")
        return cls(name)

    @property
    def syntax(self) -> Syntax:
        return SYNTAXES[self.name]

    @property
    def openings(self) -> tuple[bytes, tuple[bytes, ...]]:
        """What opens calls anywhere in a text, and what does so at its beginning only."""
        return self.syntax.opening.encode(), (b"{",) if self.syntax.bare else ()

    def made_exclusive(self) -> "CallFormat":
        return replace(self, exclusive=True)

    def spelled(self, tokenizer: Tokenizer) -> dict[int, bytes]:
        """The markers that are single tokens of this vocabulary, special or not, as bytes."""
        ids = {marker: tokenizer.token_id(marker) for marker in self.syntax.markers}
        return {id: marker.encode() for marker, id in ids.items() if id is not None}

    def stream(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> "CallStream":
        """A new text, its content to be cut before the first of `stops`."""
        return CallStream(self, tokenizer, stops)


def _detected(source: str) -> CallFormat | None:
    """By what a family's templates write; a relative of a family with another form is none."""
    if "<tool_call>" in source:
        other = "<arg_key>" in source or "<function=" in source
        return CallFormat("hermes") if "arguments" in source and not other else None
    if "[TOOL_CALLS]" in source:
        if "[ARGS]" in source:
            return CallFormat("mistral-args")
        return CallFormat("mistral") if re.search(r"\[TOOL_CALLS\] ?\[", source) else None
    llama = "<|start_header_id|>" in source and '"parameters": ' in source
    return CallFormat("llama3") if llama or "<|python_tag|>" in source else None


class CallStream:
    """One choice's text with calls in it; like TextStream a function of the tokens pushed.

    Content goes on until a call opens; from there on all is calls, and what is none is dropped. A
    marker that closes what is not open is no content either.
    Stop strings are looked for in content only, and only its tokens have entries.
    """

    def __init__(self, form: CallFormat, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        syntax = form.syntax
        self._tokenizer, self._stops, self._syntax = tokenizer, stops, syntax
        self._spelled = form.spelled(tokenizer)
        opening, at_start = form.openings
        self._first = (opening,) if form.exclusive else at_start
        openings = () if form.exclusive else ("\n" + syntax.opening, syntax.opening)
        opener = tokenizer.token_id(syntax.opening)
        visible = {id: data for id, data in self._spelled.items() if form.exclusive or id == opener}
        others = [m for m in syntax.markers if m != syntax.opening and m not in stops]
        silent = () if form.exclusive else tuple(others)
        self._content = TextStream(tokenizer, stops + openings, visible, silent)
        self._waiting: list[tuple[int, LogprobEntry | None]] = []  # while the beginning is open
        self._undecided = bool(self._first)
        self._start, self._lead = b"", tokenizer.lead
        self._reader: Reader | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stopped = False

    @property
    def text(self) -> str:
        """The content emitted so far."""
        return self._content.text

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls told so far; the last one's arguments may be unfinished."""
        return self._reader.calls if self._reader else ()

    def push(self, token: int, logprob: LogprobEntry | None = None) -> Emitted:
        """Take a token and its entry; release what is certain. EOS is not pushed."""
        if self._stopped:
            raise ValueError("the text has ended before a stop string")
        if self._reader is not None:
            return self._read(self._bytes(token))
        if self._undecided:
            return self._begin(token, logprob)
        return self._opened(self._content.push(token, logprob))

    def finish(self) -> Emitted:
        """Release all that is held; an opening that was not finished is content."""
        if self._reader is not None:
            return self._read(b"", final=True)
        if self._undecided:
            began = self._as_content()
            if began.stopped or self._reader is not None:
                return began
            return _joined(began, self._content.finish())
        return self._opened(self._content.finish())

    def _bytes(self, token: int) -> bytes:
        return self._spelled.get(token) or self._tokenizer.token_bytes(token)

    def _begin(self, token: int, logprob: LogprobEntry | None) -> Emitted:
        """Before it is known whether the text begins with a call."""
        self._waiting.append((token, logprob))
        data, self._lead = self._lead.cut(self._bytes(token))
        self._start += data
        if self._start.startswith(self._first):
            self._undecided, self._reader = (
                False,
                reader(not self._syntax.quoted, self._syntax.before),
            )
            return self._read(self._start)
        if any(first.startswith(self._start) for first in self._first):
            return Emitted()
        return self._as_content()

    def _as_content(self) -> Emitted:
        self._undecided, released = False, Emitted()
        for each in self._waiting:
            if not released.stopped:
                released = _joined(released, self.push(*each))
        return released

    def _opened(self, emitted: Emitted) -> Emitted:
        """Go on with calls where the text was cut by their opening and no stop string."""
        if not emitted.stopped:
            return emitted
        rest = self._content.rest
        if rest.startswith(self._stops):
            self._stopped = True
            return emitted
        opened = self._read(rest.encode() + self._content.dangling)
        return replace(emitted, stopped=False, calls=opened.calls)

    def _read(self, data: bytes, final: bool = False) -> Emitted:
        if self._reader is None:
            self._reader = reader(not self._syntax.quoted, self._syntax.before)
        return Emitted(calls=tuple(self._reader.read(self._decoder.decode(data, final))))


def _joined(one: Emitted, other: Emitted) -> Emitted:
    return Emitted(
        one.text + other.text,
        one.logprobs + other.logprobs,
        other.stopped,
        one.calls + other.calls,
    )
