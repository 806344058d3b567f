"""A peer in a process of its own, asked in lines of JSON; its side is peer_side.py."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peer_side import Work
from stopwatch import busy_cpu_seconds
from turns import Turn, others_share


class PeerProcess:
    """`script` under another Python; its first line says its `versions`."""

    def __init__(self, python: Path, script: Path, *words: str) -> None:
        self._name = script.name
        self._process = subprocess.Popen(
            [str(python), str(script), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions: dict[str, str] = self._read()["versions"]

    def ask(self, command: Mapping[str, object]) -> dict[str, Any]:
        """Its answer to one command; SystemExit if it has ended."""
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._read()

    def turn(self, mode: str, work: Work) -> Turn:
        """Its turn at a piece of work, in one of the modes of its script."""
        busy = busy_cpu_seconds()
        reply = self.ask({"mode": mode, "work": asdict(work)})
        seconds = float(reply["seconds"])
        others = others_share(busy, float(reply["cpu_seconds"]), seconds)
        stamps = [(float(at), int(tokens)) for at, tokens in reply["stamps"]]
        return Turn(seconds, reply["tokens"], others, stamps)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply
