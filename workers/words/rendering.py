"""Texts from foreign templates, rendered by a child process that may fail, stall or be killed.

`Renderer` starts `workers.words.sandbox` and sees to it that it answers within its limits: one that
does not is killed, and another is started for the next rendering. Knows nothing of what the
templates are for.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from orchestrator.errors import WorkerError
from workers.words import sandbox
from workers.words.sandbox import DONE, LIMITS, REFUSED, Limits, receive, send, to_bytes, to_text

_START_SECONDS = 60.0  # for Python to come up on a machine with a cold disk
_WAITED = 4  # a limit of processor time may take so much longer by the clock on a busy machine
_BYTES = 4  # of one character, at most
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


class RenderError(Exception):
    """A template does not compile, refuses, or goes beyond its limits; the text says which."""


class Renderer:
    """Compiled templates in a child process. Threads may share it; they wait for each other.

    The child ends with `close`, with this object, and with this process, however that ends.
    """

    def __init__(self, sources: Sequence[str], limits: Limits = LIMITS) -> None:
        """Raises RenderError for a source that does not compile, WorkerError for no process."""
        self._setup = to_bytes(json.dumps({"sources": list(sources), "limits": asdict(limits)}))
        self._limits = limits
        self._lock = threading.Lock()
        self._child: _Child | None = self._started()

    def render(self, template: int, values: Mapping[str, Any], now: datetime) -> str:
        """The text of the template at this position of the sources, over plain JSON values.

        `now` is what its `strftime_now` tells. Raises RenderError, and WorkerError if no process
        can be started.
        """
        asked = {"template": template, "values": values, "now": now.isoformat()}
        try:
            content = to_bytes(json.dumps(asked, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError(f"values that are no plain JSON: {error}") from error
        with self._lock:
            try:
                return self._rendered(content)
            except _Ended:  # perhaps by what it did before: only what ends two is to blame
                return self._once_more(content)

    def close(self) -> None:
        """End the child; another rendering would start another."""
        with self._lock:
            self._end()

    def _once_more(self, content: bytes) -> str:
        try:
            return self._rendered(content)
        except _Ended as error:
            raise RenderError(str(error)) from None

    def _rendered(self, content: bytes) -> str:
        self._child = self._child or self._started()
        try:
            return self._child.ask(content, self._limits.seconds * _WAITED)
        except RenderError:
            raise
        except _TooLong:
            self._end()
            raise self._took_too_long() from None
        except BaseException:  # an interrupt too: the next rendering must not get this one's answer
            self._end()
            raise

    def _started(self) -> "_Child":
        child = _Child(self._limits)
        try:
            child.ask(self._setup, _START_SECONDS)
        except _TooLong:
            child.end()
            raise self._took_too_long() from None
        except _Ended as error:
            child.end()
            raise WorkerError("model", f"the chat template's process: {error}") from None
        except RenderError:
            child.end()
            raise
        return child

    def _end(self) -> None:
        if self._child:
            self._child.end()
            self._child = None

    def _took_too_long(self) -> RenderError:
        return RenderError(f"takes more than {self._limits.seconds:g} seconds")


class _Ended(Exception):
    """The child is gone, and nobody asked it to."""


class _TooLong(Exception):
    """The child used up its time."""


class _Child:
    """One process; of no use any more once it ended or took too long."""

    def __init__(self, limits: Limits) -> None:
        self._most = limits.characters * _BYTES + 2**20
        self._connection, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = _process(theirs)
            except OSError as error:
                self._connection.close()
                reason = f"the chat template's process does not start: {error}"
                raise WorkerError("model", reason) from error
        self.end = weakref.finalize(self, _end, self._process, self._connection)

    def ask(self, content: bytes, seconds: float) -> str:
        """The answer's text, within so many seconds; raises RenderError, _Ended, _TooLong."""
        deadline = time.monotonic() + seconds
        try:
            self._connection.settimeout(seconds)
            send(self._connection, content)
            answer = receive(self._connection, self._most, deadline)
            kind, text = answer[:1], to_text(answer[1:])
            if kind not in (DONE, REFUSED):
                raise EOFError("no answer")
        except TimeoutError:
            raise _TooLong from None
        except (EOFError, OSError, UnicodeDecodeError) as error:
            raise self._reason(error) from None
        if kind == REFUSED:
            raise RenderError(text)
        return text

    def _reason(self, error: Exception) -> Exception:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.returncode
        if code == -signal.SIGPROF:
            return _TooLong()
        if code is None:
            return _Ended(f"its process answers what is no answer: {error}")
        return _Ended(f"its process ended with exit code {code}")


def _process(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Python where this process's libraries are, without its environment: no URL, no password.

    In a session of its own, so that the terminal's Ctrl-C does not reach it.
    """
    environ = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    return subprocess.Popen(  # noqa: S603 - our own file
        [sys.executable, "-S", "-P", os.path.abspath(sandbox.__file__)],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        env=environ,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
