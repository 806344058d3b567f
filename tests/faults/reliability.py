"""Runs the fault tests and writes what they measured into docs/reliability.md.

    python -m tests.faults.reliability            the short form, as in `make test`
    python -m tests.faults.reliability --soak     the long form
    python -m tests.faults.reliability --from F   only the page, from the rows in F (FAULT_TABLE)

Exits as pytest did. An ordinary test run does not touch the page.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--from", dest="file", type=Path)
    chosen = parser.parse_args()
    if chosen.file:
        write(read(chosen.file), "long" if chosen.soak else "short")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.jsonl"
        tests = ["tests", "-m", "soak"] if chosen.soak else ["tests/faults", "-m", "not soak"]
        command = [sys.executable, "-m", "pytest", *tests, "--timeout", "7200"]
        code = subprocess.call(command, cwd=ROOT, env={**os.environ, "FAULT_TABLE": str(table)})
        if table.exists():
            write(read(table), "long" if chosen.soak else "short")
    return code


def read(file: Path) -> list[dict[str, Any]]:
    """The rows that the tests left, those of one fault and place together."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        new = json.loads(line)
        row = rows.setdefault((new["fault"], new["place"]), {**new, "seeds": []})
        row["seeds"].append(new["seed"])
        if len(row["seeds"]) > 1:
            row["times"] += new["times"]
            row["recovered"] += new["recovered"]
            row["violations"] += new["violations"]
    return list(rows.values())


def write(rows: Iterable[dict[str, Any]], form: str) -> None:
    """Put the table between the page's two marks."""
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    table = "\n".join(_lines(rows, form))
    PAGE.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


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
