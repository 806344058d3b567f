"""Run another program to its end, its lines told as they come; it never outlives us.

Knows nothing of what the program does.
"""

import ctypes
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # they would lead into our environment
_KEPT = 30  # lines
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class Failed(Exception):
    """The program ended with an exit code that is not 0; `lines` are the last that it said."""

    def __init__(self, code: int, lines: Sequence[str]) -> None:
        super().__init__(f"exit code {code}: {lines[-1] if lines else 'it said nothing'}")
        self.code, self.lines = code, list(lines)


def run(command: Sequence[str], told: Callable[[str], None]) -> None:
    """Run `command`, telling every line of its stdout and stderr; raises Failed.

    Whatever ends this call early, a signal too, ends the program and what it started.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _OURS}
    last: deque[str] = deque(maxlen=_KEPT)
    process = subprocess.Popen(  # noqa: S603 - the caller's own words, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        for line in process.stdout:
            if line.strip():
                last.append(line.rstrip())
                told(line.rstrip())
        code = process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close() if process.stdout else None
    if code:
        raise Failed(code, list(last))


def _end_with_parent() -> None:
    """For the case that we are killed and no `finally` runs; only Linux knows it."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
