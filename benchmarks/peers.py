"""A peer in a process of its own, asked in lines of JSON; knows nothing of what it is asked."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
