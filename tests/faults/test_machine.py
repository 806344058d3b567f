"""The machine under a worker: a full disk, and a clock that steps."""

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults.conftest import MakeStage
from tests.faults.harness import LEASE_SECONDS, Stage
from tests.faults.invariants import Result

FULL_SECONDS = LEASE_SECONDS + 1.5
STEPS = (7200, -7200)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with a few megabytes of its own where this user may mount, else just a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_disk_full(make_stage: MakeStage, golden: Result, small_disk: Path) -> None:
    full(make_stage("disk full", f"sqlite:///{small_disk / 'x.db'}"), golden, small_disk, 1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_disk_full_ten_times(make_stage: MakeStage, golden: Result, small_disk: Path) -> None:
    full(make_stage("disk full", f"sqlite:///{small_disk / 'x.db'}"), golden, small_disk, 10)


def test_clock_steps(make_stage: MakeStage, golden: Result) -> None:
    clock_steps(make_stage("clock of a worker steps by 2 h", "postgresql"), golden, 2)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_clock_steps_ten_times(make_stage: MakeStage, golden: Result) -> None:
    clock_steps(make_stage("clock of a worker steps by 2 h", "postgresql"), golden, 10)


def full(stage: Stage, golden: Result, disk: Path, times: int) -> None:
    """Nothing can be written for longer than a lease lasts, then it can again."""
    stage.submit()
    with stage.working(2):
        for _ in range(times):
            stage.amid_work(stage.rng.randrange(20, 150))
            with _filled(disk) if os.path.ismount(disk) else _limited(stage):
                time.sleep(FULL_SECONDS)
            stage.fault()
        stage.finish()
    stage.check(golden)


def clock_steps(stage: Stage, golden: Result, times: int) -> None:
    """Only a worker's own wall clock steps, not its monotonic one, nor the database's."""
    now = stage.folder / "now"
    now.write_text("0")
    stage.submit()
    with stage.working(1) as fleet:
        guest = fleet.join(FAULT_CLOCK=str(now))
        stage.wait(lambda: "claimed" in guest.said() or _submitted(stage), "claim by the guest")
        for step in range(times):
            stage.amid_work(stage.rng.randrange(20, 100))
            now.write_text(str(STEPS[step % 2]))
            stage.fault()
            stage.wait(lambda step=step: _is_off(guest.said(), STEPS[step % 2], stage), "step")
        stage.finish()
        assert guest.code is None, guest.said()
    stage.check(golden)


def _submitted(stage: Stage) -> bool:
    if stage.over:
        stage.submit()
    return False


def _is_off(said: str, seconds: float, stage: Stage) -> bool:
    """The last line of a log is dated so far from now; there is more to do until then."""
    _submitted(stage)
    dates = [line[:19] for line in said.splitlines() if line[:2] == "20"]
    dated = datetime.strptime(dates[-1], "%Y-%m-%d %H:%M:%S").astimezone()
    return abs((dated - datetime.now(UTC)).total_seconds() - seconds) < 600


@contextlib.contextmanager
def _filled(disk: Path) -> Iterator[None]:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    yield
    (disk / "filler").unlink()


@contextlib.contextmanager
def _limited(stage: Stage) -> Iterator[None]:
    """No file of a worker may grow beyond a page: EFBIG, as near as it gets without a mount."""
    assert stage.fleet is not None
    workers = stage.fleet.workers.copy()
    for worker in workers:
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    yield
    for worker in workers:
        if worker.code is None:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, unlimited)
