"""Real processes of the product for the fault tests, and a fleet that starts dead workers again.

Knows how processes are started, signalled and mourned; nothing of jobs or databases.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
RESTART_SECONDS = 0.3


class Process:
    """One process by its pid; `code` is None while it runs, -9 after kill -9."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.log = Path(os.devnull)
        self.code: int | None = None
        self.ended = threading.Event()

    def signal(self, sign: int) -> None:
        """Send it; nothing if the process has ended."""
        if self.code is None:
            with suppress(ProcessLookupError):  # it has ended since it was asked
                os.kill(self.pid, sign)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = START_SECONDS) -> int:
        """Its exit code; raises TimeoutError."""
        if not self.ended.wait(timeout):
            raise TimeoutError(f"process {self.pid} does not end: {self.said()}")
        assert self.code is not None
        return self.code

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]


class Launcher:
    """Orders processes from `tests.faults.launcher`; see there. They all end with it."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.launcher"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._lock = threading.Lock()
        self._started: SimpleQueue[Process] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=START_SECONDS)
        self._reader.join(START_SECONDS)
        self._server.stdout.close()

    def start(self, *argv: str, env: Mapping[str, str], cwd: Path, log: Path) -> Process:
        """`penstock ARGV` in a folder; the environment holds no setting but those in `env`."""
        clean = {name: v for name, v in os.environ.items() if not name.startswith("PENSTOCK_")}
        clean |= {"PYTHONPATH": str(ROOT), **env}
        order = {"argv": argv, "env": clean, "cwd": str(cwd), "log": str(log)}
        log.touch()
        with self._lock:
            assert self._server.stdin is not None
            self._server.stdin.write(json.dumps(order).encode() + b"\n")
            self._server.stdin.flush()
            process = self._started.get(timeout=START_SECONDS)
        process.log = log
        return process

    def _read(self) -> None:
        assert self._server.stdout is not None
        running: dict[int, Process] = {}
        for line in self._server.stdout:
            answer = json.loads(line)
            if "code" not in answer:
                running[answer["pid"]] = process = Process(answer["pid"])
                self._started.put(process)
            else:
                process = running.pop(answer["pid"])
                process.code = answer["code"]
                process.ended.set()


class Fleet:
    """Some workers, each started again when it has ended, as a service manager would."""

    def __init__(
        self,
        launcher: Launcher,
        folder: Path,
        size: int,
        env: Mapping[str, str],
    ) -> None:
        self._launcher, self._folder, self._env = launcher, folder, env
        self.starts = 0
        self._guests: list[Process] = []
        self.workers = [self._start({}) for _ in range(size)]
        self._leaving = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def close(self) -> None:
        """kill -9 of all that is left."""
        self._leaving.set()
        self._supervisor.join(START_SECONDS)
        for worker in [*self.workers, *self._guests]:
            worker.kill()

    def join(self, **env: str) -> Process:
        """One more worker, which is not started again."""
        guest = self._start(env)
        self._guests.append(guest)
        return guest

    def stop(self) -> list[int]:
        """SIGTERM to all, no more restarts; their exit codes."""
        self._leaving.set()
        self._supervisor.join(START_SECONDS)
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        return [worker.wait() for worker in self.workers]

    def said(self) -> str:
        """The ends of the last logs."""
        logs = [self._folder / f"worker-{n}.log" for n in range(self.starts, 0, -1)]
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs[:6])

    def count(self, words: str) -> int:
        """How often all workers together have said it."""
        logs = self._folder.glob("worker-*.log")
        return sum(log.read_text(errors="replace").count(words) for log in logs)

    def _start(self, env: Mapping[str, str]) -> Process:
        self.starts += 1
        log = self._folder / f"worker-{self.starts}.log"
        argv = ("worker", "--model", "tiny", "--slots", "4")
        return self._launcher.start(*argv, env={**self._env, **env}, cwd=self._folder, log=log)

    def _supervise(self) -> None:
        while not self._leaving.is_set():
            for place, worker in enumerate(self.workers):
                if worker.ended.is_set():
                    if worker.code != -signal.SIGKILL:
                        time.sleep(RESTART_SECONDS)
                    self.workers[place] = self._start({})
            time.sleep(0.02)
