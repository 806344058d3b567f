"""The program that runs chat templates: a process of its own, under limits, told by a socket.

A template comes with a model and is foreign code. Jinja2's sandbox keeps it from the process's
objects, not from its memory or its time, so it is compiled and rendered here, where the worst
that it can do is to end this process. The environment is that of
docs/chat-completions-streaming.md section 8, which reproduces the transformers library.

Run by `workers.words.rendering` as a program, with a socket as its standard input: first come the
sources and limits, then one rendering a message. Ends when the socket does. Knows nothing of chat
or models, and imports nothing but jinja2, so that it starts soon and alike from everywhere.
"""

import json
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_REASON = 2_000  # characters of an error's text
DONE, REFUSED = b"+", b"-"  # how an answer begins; its text follows
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What compiling a template, or rendering it once, may cost."""

    seconds: float = 2.0  # of processor time, so that a busy machine fails nobody
    memory_bytes: int = 512 * _MIB  # of address space, where the system can bound it
    characters: int = 16_000_000  # of the text that comes out


LIMITS = Limits()


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a training run masks: here its body."""

    tags = {"generation"}  # noqa: RUF012 - the attribute is jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict(...)` as a template may use it: a function, not the class with its attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, without attributes that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # a value may be called `self`
        self, *given = args
        values = dict(*given, **values)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def environment() -> ImmutableSandboxedEnvironment:
    """What a chat template is written for, but for `strftime_now`, which each rendering gets."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise_exception,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML and sorts the keys."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def rendered(template: jinja2.Template, values: Mapping[str, Any], now: datetime, most: int) -> str:
    """The template's text, of at most `most` characters; what it raises is its own affair."""
    random.seed(0)  # `random` and `lipsum` too say the same on every attempt
    pieces, size = [], 0
    for piece in template.generate(values, strftime_now=_strftime(now)):
        size += len(piece)
        if size > most:
            raise jinja2.TemplateError(f"the prompt exceeds {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def _strftime(now: datetime) -> Callable[[str], str]:
    return now.strftime


# --- the socket: eight bytes of length, then that many of content ---------------------------------


def send(connection: socket.socket, content: bytes) -> None:
    """Raises OSError if the other side is gone, TimeoutError by the socket's own timeout."""
    connection.sendall(len(content).to_bytes(8, "big"))
    connection.sendall(content)


def receive(connection: socket.socket, most: int, deadline: float | None = None) -> bytes:
    """The next content, of at most `most` bytes, until `deadline` (of `time.monotonic`).

    Raises EOFError if the other side has ended or sends more, TimeoutError, OSError.
    """
    size = int.from_bytes(_exactly(connection, 8, deadline), "big")
    if size > most:
        raise EOFError(f"{size} bytes, expected at most {most}")
    return _exactly(connection, size, deadline)


def _exactly(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    content = bytearray()
    while len(content) < size:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 1e-6))
        piece = connection.recv(min(size - len(content), _MIB))
        if not piece:
            raise EOFError
        content += piece
    return bytes(content)


def to_bytes(text: str) -> bytes:
    """UTF-8, and what is no Unicode (half of a pair) as it is: whoever encodes it refuses it."""
    return text.encode("utf-8", "surrogatepass")


def to_text(content: bytes) -> str:
    """The text of `to_bytes`."""
    return content.decode("utf-8", "surrogatepass")


# --- the process ----------------------------------------------------------------------------------


def main() -> None:
    """Compile what the first message holds, then render until the socket's end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the worker decides when it needs us no more
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    with suppress(EOFError, OSError), socket.socket(fileno=0) as connection:
        _serve(connection)


def _serve(connection: socket.socket) -> None:
    setup = json.loads(to_text(receive(connection, 2**40)))
    limits = Limits(**setup["limits"])
    _limit_memory(limits.memory_bytes)
    templates: list[jinja2.Template] = []
    sound = _answer(connection, limits, lambda: _compile(setup["sources"], templates))
    while sound:
        content = receive(connection, 2**40)
        sound = _answer(connection, limits, lambda: _render(content, templates, limits))  # noqa: B023


def _answer(connection: socket.socket, limits: Limits, work: Callable[[], str]) -> bool:
    """Send what `work` yields or why it failed; False if this process is to be replaced."""
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)  # at its end the system ends us
    sound = True
    try:
        answer = DONE + to_bytes(work())
    except MemoryError:
        answer, sound = (
            REFUSED + b"needs more than %d MiB of memory" % (limits.memory_bytes // _MIB),
            False,
        )
    except Exception as error:  # foreign code: whatever it raises is its error
        reason = str(error)[:MAX_REASON] or type(error).__name__
        answer = REFUSED + to_bytes(reason)
    send(connection, answer)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return sound


def _compile(sources: Sequence[str], templates: list[jinja2.Template]) -> str:
    templates += map(environment().from_string, sources)
    return ""


def _render(content: bytes, templates: Sequence[jinja2.Template], limits: Limits) -> str:
    asked = json.loads(to_text(content))
    now = datetime.fromisoformat(asked["now"])
    return rendered(templates[asked["template"]], asked["values"], now, limits.characters)


def _limit_memory(most: int) -> None:
    for kind, bound in ((resource.RLIMIT_AS, most), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        with suppress(ValueError, OSError):  # not every system bounds it
            resource.setrlimit(kind, (bound, bound))


if __name__ == "__main__":
    main()
