"""A worker's wall clock steps by two hours, forward and back.

Where there is a C compiler, the clock of the whole process steps (`clock.c`, preloaded); elsewhere
what its Python code reads of it (`failpoints.py`).
"""

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults.conftest import MakeStage
from tests.faults.harness import Stage, many
from tests.faults.invariants import Result

STEPS = (7200, -7200)
SOURCE = Path(__file__).parent / "clock.c"


@pytest.fixture
def shifted(tmp_path: Path) -> dict[str, str]:
    """The environment of a worker whose clock is off by what stands in the file `now`."""
    now = tmp_path / "now"
    _set(now, 0)
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return {"FAULT_CLOCK": str(now)}
    library = tmp_path / "clock.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return {"FAULT_CLOCK_FILE": str(now), "LD_PRELOAD": str(library)}


def test_clock_steps(make_stage: MakeStage, golden: Result, shifted: dict[str, str]) -> None:
    clock_steps(make_stage(_name(shifted), "postgresql"), golden, shifted, 2)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_clock_steps_ten_times(
    make_stage: MakeStage, golden: Result, shifted: dict[str, str]
) -> None:
    clock_steps(make_stage(_name(shifted), "postgresql"), golden, shifted, many(10))


def clock_steps(stage: Stage, golden: Result, shifted: dict[str, str], times: int) -> None:
    """Only a worker's own wall clock steps, not its monotonic one, nor the database's."""
    stage.submit()
    with stage.working(1) as fleet:
        guest = fleet.join(**shifted)
        stage.wait(lambda: "claimed" in guest.said() or stage.keep_busy(), "claim by the guest")
        for step in range(times):
            stage.amid_work(stage.rng.randrange(20, 100))
            _set(stage.folder / "now", STEPS[step % 2])
            stage.fault()
            stage.wait(lambda step=step: _is_off(guest.said(), STEPS[step % 2], stage), "step")
        stage.finish()
        assert guest.code is None, guest.said()
    stage.check(golden)


def _name(shifted: dict[str, str]) -> str:
    where = "of its process" if "LD_PRELOAD" in shifted else "of its Python code"
    return f"clock of a worker ({where}) steps by 2 h"


def _set(file: Path, seconds: int) -> None:
    """Never empty, not even for a moment."""
    with file.open("r+" if file.exists() else "w") as now:
        now.write(f"{seconds:>8}")


def _is_off(said: str, seconds: float, stage: Stage) -> bool:
    """The last line of a log is dated so far from now; there is more to do until then."""
    stage.keep_busy()
    dates = [line[:19] for line in said.splitlines() if line[:2] == "20"]
    dated = datetime.strptime(dates[-1], "%Y-%m-%d %H:%M:%S").astimezone()
    return abs((dated - datetime.now(UTC)).total_seconds() - seconds) < 600
