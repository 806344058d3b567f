"""Starts the product's processes for these tests, in a tenth of the time that Python needs.

`python -m tests.faults.launcher` imports the product once, then forks a process for each order, a
line of JSON on its input: {"argv", "env", "cwd", "log"}. It answers {"pid"}, and {"pid", "code"}
when that process has ended. When its input ends, so do all its processes.

`python -m tests.faults.launcher ARGV...` is one such process by itself: faults that the environment
names are put in (`failpoints.py`), then the command line runs.
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from typing import Any, NoReturn

from orchestrator import cli
from tests.faults import failpoints


def serve() -> None:
    """Take orders until the input ends; in a forked process it does not return."""
    import alembic.command
    import kombu.transport.redis
    import psycopg

    import workers.process

    assert all((alembic.command, kombu.transport.redis, psycopg, workers.process))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: set[int] = set()
    while True:
        readable, _, _ = select.select([0], [], [], 0.02)
        _reap(running)
        if not readable:
            continue
        line = os.read(0, 1 << 20)
        if not line:
            break
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
        running.add(pid)
        _answer(pid=pid)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run(argv: list[str]) -> NoReturn:
    """One process of the product, with the faults that the environment names."""
    failpoints.arm(os.environ)
    sys.argv = ["penstock", *argv]
    cli.main()
    sys.exit(0)


def _become(order: dict[str, Any]) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((null, log, log)):
        os.dup2(file, number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    if "LD_PRELOAD" in os.environ:  # the loader reads it, so that a fork will not do
        argv = [sys.executable, "-m", "tests.faults.launcher", *order["argv"]]
        os.execv(sys.executable, argv)  # noqa: S606
    code = 1
    try:
        run(order["argv"])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]  # what leaving would wait for
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the exit handlers: onnxruntime's wait for a thread that did not come along in the fork.
    os._exit(code)


def _reap(running: set[int]) -> None:
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            running.discard(pid)
            _answer(pid=pid, code=os.waitstatus_to_exitcode(status))


def _answer(**fields: int) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


if __name__ == "__main__":
    run(sys.argv[1:]) if sys.argv[1:] else serve()
