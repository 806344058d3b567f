"""The benchmark of the reads runs: a smoke run on both databases. Nothing here looks at a speed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
READS = (
    "job_status",
    "standing",
    "requests, a page",
    "errors",
    "points_page ",
    "GET /api/jobs/ID ",
)


def test_a_small_run_prints_every_read() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "api.py"), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for kind in ("sqlite", "postgresql"):
        assert f"{kind}: 2,000 requests, 20,000 chunks" in done.stdout
    for read in READS:
        found = [line for line in done.stdout.splitlines() if line.startswith(read)]
        assert len(found) == 2, (read, done.stdout)
