"""A folder in which penstock is run as a person runs it: real processes, a real model."""

import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.folders.folder import TINY
from workers.words.chat import eos_token_ids
from workers.words.tokenizer import Tokenizer

CHECKOUT = Path(__file__).parents[2]
JOB = """
name: sums
model: tiny
dataset:
  items: [{a: 12, b: 30}, {a: 5, b: 9}, {a: 40, b: 41}, {a: 7, b: 7}]
params:
  messages: [{role: user, content: "What is {{ a }} + {{ b }}?"}]
  max_tokens: 24
  n: 2
sweep: {temperature: [0, 1.0]}
graders:
  - {name: correct, type: contains, expected: "{{ a + b }}"}
"""
LONG = """
name: long
model: tiny
dataset: {items: [%s]}
params:
  messages: [{role: user, content: "Repeat exactly: {{ w }} \\U0001f600"}]
  max_tokens: 300
  temperature: 1.4
  logit_bias: {%s}
"""


@dataclass(frozen=True)
class Ended:
    """A finished process: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Shell:
    """A folder in which penstock is run."""

    folder: Path

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str, **env: str) -> Ended:
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=120)
        return Ended(process.returncode, out, err)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.folder / "penstock.db")
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()


def long_job(folder: Path, n: int = 48) -> None:
    """n completions of 300 tokens each: the tokens that end a text are biased away."""
    words = ", ".join(f"{{w: word{i}}}" for i in range(n))
    ends = ", ".join(f"{id}: -100" for id in eos_token_ids(TINY, Tokenizer(TINY)))
    (folder / "long.yaml").write_text(LONG % (words, ends))
