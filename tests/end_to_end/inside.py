"""The command line inside this process: a second cheaper for each call than a process of its own.

Knows nothing of what is run; warnings are errors here too, which a child process would not know.
"""

import contextlib
import io
import signal
import sys
from dataclasses import dataclass

import pytest

from orchestrator.cli import main


@dataclass(frozen=True, slots=True)
class Ended:
    """What a process would have left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def penstock(*arguments: str) -> Ended:
    """`penstock ARGUMENTS` through the entry point itself, in the working directory."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    terminate = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["penstock", *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
            finally:
                signal.signal(signal.SIGTERM, terminate)
    return Ended(code, out.getvalue(), err.getvalue())
