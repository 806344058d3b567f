"""The mutation gate: each safety taken out of a copy of the product must turn the fault tests red.

    python -m tests.faults.mutations [NAME ...]

Prints one line per mutation and exits 1 if the tests stayed green without one of them. What ends
no more counts as red: the tests wait for WAIT_SECONDS only, and fail. The unique key alone has no
mutation: behind the epoch and the token count nothing reaches it, which is why all three go
together in the first.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = "20"
LEFT_OUT = shutil.ignore_patterns(
    ".venv*", ".git", "__pycache__", ".hypothesis", ".*_cache", "build", "out"
)


@dataclass(frozen=True, slots=True)
class Mutation:
    """Text replaced in files of the product, and the tests that must notice."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


ZOMBIES = ("tests/faults/test_workers.py::test_zombie", "tests/orchestrator/db/test_flush.py")
MUTATIONS = (
    Mutation(
        "no epoch check, no token count check, no unique key",
        (
            (
                "orchestrator/db/flushes.py",
                "if held is None or held.epoch != write.epoch:",
                "if held is None:",
            ),
            (
                "orchestrator/db/flushes.py",
                " or n_tokens.get(chunk.choice) != chunk.token_start:",
                ":",
            ),
            (
                "orchestrator/db/flushes.py",
                "tx.execute(insert(ChunkRow), chunks)",
                "tx.execute(insert(ChunkRow).prefix_with('OR REPLACE', dialect='sqlite'), chunks)",
            ),
        ),
        ZOMBIES,
    ),
    Mutation(
        "no epoch check",
        (
            (
                "orchestrator/db/flushes.py",
                "if held is None or held.epoch != write.epoch:",
                "if held is None:",
            ),
        ),
        ("tests/orchestrator/db/test_flush.py",),
    ),
    Mutation(
        "no token count check",
        (
            (
                "orchestrator/db/flushes.py",
                " or n_tokens.get(chunk.choice) != chunk.token_start:",
                ":",
            ),
        ),
        ("tests/orchestrator/db/test_flush.py",),
    ),
    Mutation(
        "no reconciler",
        (
            (
                "orchestrator/reconciler.py",
                "released = store.release_expired(db)",
                "released = 0",
            ),
        ),
        ("tests/faults/test_workers.py::test_kill_of_a_worker",),
    ),
    Mutation(
        "BEGIN instead of BEGIN IMMEDIATE",
        (("orchestrator/db/database.py", '"BEGIN IMMEDIATE" if write else "BEGIN"', '"BEGIN"'),),
        ("tests/orchestrator/db", "tests/faults/test_workers.py"),
    ),
    Mutation(
        "no attempt count at claim",
        (
            (
                "orchestrator/db/claims.py",
                "idle_attempts=RequestRow.idle_attempts + 1",
                "idle_attempts=RequestRow.idle_attempts",
            ),
        ),
        ("tests/faults/test_poison.py::test_poison[segfault]",),
    ),
)


def main() -> int:
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or m.name in sys.argv[1:]]
    survived = 0
    for mutation in chosen:
        began = time.monotonic()
        red, last = _goes_red(mutation)
        survived += not red
        seconds = time.monotonic() - began
        print(
            f"{'red  ' if red else 'GREEN'}  {mutation.name}, {seconds:.0f} s: {last}", flush=True
        )
    return 1 if survived else 0


def _goes_red(mutation: Mutation) -> tuple[bool, str]:
    """Whether a test failed, and pytest's last line."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for name, old, new in mutation.edits:
            text = (copy / name).read_text(encoding="utf-8")
            if old not in text:
                raise SystemExit(f"{name} does not hold {old!r} any more")
            (copy / name).write_text(text.replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not soak", "--timeout", "100", *mutation.tests]
        env = {**os.environ, "FAULT_WAIT_SECONDS": WAIT_SECONDS}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return done.returncode == 1, (failed or lines)[-1][:160]


if __name__ == "__main__":
    sys.exit(main())
