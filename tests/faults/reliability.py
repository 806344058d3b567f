"""Runs the fault tests and writes what they measured into docs/reliability.md.

    python -m tests.faults.reliability            the short form, as in `make test`
    python -m tests.faults.reliability --soak     the long form, each test by itself;
        --shards N                                so many of them at a time
    python -m tests.faults.reliability --from F.. only the page, from the rows in F (FAULT_TABLE)

Exits 1 when a test failed. An ordinary test run does not touch the page. What the tests of the long
form say is kept in `build/soak`. With FAULT_TIMES=2 no fault of the long form comes more often than
that: to try it; the table is only printed then.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
KEPT = ROOT / "build"
WAIT_SECONDS = "600"  # what three tests at a time may need until dozens of jobs are done
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout", "7200")
LONGEST = ("thousand", "PostgreSQL down", "Redis frozen", "five_hundred", "poison", "many_trans")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--from", dest="files", type=Path, nargs="+")
    chosen = parser.parse_args()
    form = "long" if chosen.soak else "short"
    folder = KEPT / ("soak" if chosen.soak else "short")
    code = 0
    if not chosen.files:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        code = soak(folder, chosen.shards) if chosen.soak else short(folder)
    rows = read(chosen.files or sorted(folder.glob("*.jsonl")))
    if "FAULT_TIMES" in os.environ:
        print("\n".join(_lines(rows, form)))
    else:
        write(rows, form)
    return code


def short(folder: Path) -> int:
    """The tests as `make test` runs them."""
    command = [*PYTEST, "tests/faults", "-m", "not soak"]
    return subprocess.call(command, cwd=ROOT, env=_env(folder / "table.jsonl"))


def soak(folder: Path, shards: int) -> int:
    """Every long test in a process and with servers of its own, the longest first; 1: one failed.

    A number stands for a test, in the order in which pytest finds them.
    """
    words = [*PYTEST, "--collect-only", "-q", "-m", "soak", "tests"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tests = dict(enumerate(line for line in found.splitlines() if "::" in line))
    order = sorted(tests, key=lambda n: not any(words in tests[n] for words in LONGEST))
    with ThreadPoolExecutor(shards) as pool:
        passed = list(pool.map(lambda n: _alone(tests[n], folder / f"{n:02}"), order))
    return 0 if all(passed) else 1


def _alone(test: str, kept: Path) -> bool:
    """Run one test; `kept`.log and .jsonl hold what it said and its rows."""
    began = time.monotonic()
    with kept.with_suffix(".log").open("wb") as log:
        env = _env(kept.with_suffix(".jsonl"))
        command = [*PYTEST, "-m", "soak", "-s", test]
        code = subprocess.call(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    said = "passed" if code == 0 else f"FAILED ({kept}.log)"
    print(f"{said} in {time.monotonic() - began:.0f} s: {test}", flush=True)
    return code == 0


def _env(table: Path) -> Mapping[str, str]:
    return {"FAULT_WAIT_SECONDS": WAIT_SECONDS, **os.environ, "FAULT_TABLE": str(table)}


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows that the tests left, those of one fault and place together."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (line for file in files for line in file.read_text(encoding="utf-8").splitlines()):
        new = json.loads(line)
        row = rows.setdefault((new["fault"], new["place"]), {**new, "seeds": []})
        row["seeds"].append(new["seed"])
        if len(row["seeds"]) > 1:
            row["times"] += new["times"]
            row["recovered"] += new["recovered"]
            row["violations"] += new["violations"]
    return list(rows.values())


def write(rows: Iterable[dict[str, Any]], form: str) -> None:
    """Put the table between the page's two marks of that form."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {form}: begin -->", f"<!-- {form}: end -->"
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    table = "\n".join(_lines(rows, form))
    PAGE.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")


def _lines(rows: Iterable[dict[str, Any]], form: str) -> Iterable[str]:
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    yield f"The {form} form, {datetime.now(UTC):%Y-%m-%d}, {machine}, Python {sys.version[:6]}."
    yield ""
    yield "| fault | on | times | recoveries | slowest | violations | seed |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for row in rows:
        slowest = f"{max(row['recovered']):.1f} s" if row["recovered"] else "-"
        seeds = ", ".join(map(str, row["seeds"]))
        yield (
            f"| {row['fault']} | {row['place']} | {row['times']} | {len(row['recovered'])} "
            f"| {slowest} | {len(row['violations'])} | {seeds} |"
        )


if __name__ == "__main__":
    sys.exit(main())
