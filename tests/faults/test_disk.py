"""The disk under a database: full, and read-only.

Where this user may mount, it is a small tmpfs. Elsewhere, or with FAULT_NO_MOUNT, a limit on the
size of files stands for the full disk, and nothing for the one that is read-only.
"""

import contextlib
import functools
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.faults.conftest import MakeStage
from tests.faults.harness import LEASE_SECONDS, Stage, many
from tests.faults.invariants import Result
from tests.servers import PostgresServer, create_database

FULL_SECONDS = LEASE_SECONDS + 1.5
SIZES = {"sqlite": "6m", "postgresql": "80m"}
Trouble = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """The database whose disk it is: `sqlite`, unless the test names another."""
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture
def disk(kind: str) -> Iterator[Path]:
    """A folder with some megabytes of its own where this user may mount, else just a folder."""
    # Not pytest's tmp_path: PostgreSQL's user may not go there.
    top = Path(tempfile.mkdtemp(prefix="disk-"))
    top.chmod(0o755)
    folder = top / "disk"
    folder.mkdir()
    mounted = "FAULT_NO_MOUNT" not in os.environ and _mount(folder, f"size={SIZES[kind]}", "tmpfs")
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    shutil.rmtree(top)


@pytest.fixture
def small_postgres(disk: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL whose data lie on that disk, started again whenever it has ended."""
    data = disk / "data"
    data.mkdir(mode=0o700)
    leaving = threading.Event()
    with PostgresServer(small=data) as server:
        manager = threading.Thread(target=_keep_running, args=(server, leaving), daemon=True)
        manager.start()
        yield server
        leaving.set()
        manager.join()


DATABASES = pytest.mark.parametrize("kind", ["sqlite", "postgresql"], indirect=True)


@DATABASES
def test_disk_full(
    kind: str, make_stage: MakeStage, golden: Result, disk: Path, request: pytest.FixtureRequest
) -> None:
    full(kind, make_stage, golden, disk, request, 1)


@DATABASES
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_disk_full_ten_times(
    kind: str, make_stage: MakeStage, golden: Result, disk: Path, request: pytest.FixtureRequest
) -> None:
    full(kind, make_stage, golden, disk, request, many(10))


def test_disk_read_only(make_stage: MakeStage, golden: Result, disk: Path) -> None:
    read_only(make_stage, golden, disk, 1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_disk_read_only_ten_times(make_stage: MakeStage, golden: Result, disk: Path) -> None:
    read_only(make_stage, golden, disk, many(10))


def full(
    kind: str,
    make_stage: MakeStage,
    golden: Result,
    disk: Path,
    request: pytest.FixtureRequest,
    times: int,
) -> None:
    """Nothing can be written for longer than a lease lasts, then it can again."""
    means = "small tmpfs" if os.path.ismount(disk) else "limited files"
    if kind == "sqlite":
        stage = make_stage(f"disk full ({means})", f"sqlite:///{disk / 'x.db'}")
        limit = functools.partial(_limit_workers, stage)
    else:
        server: PostgresServer = request.getfixturevalue("small_postgres")
        stage = make_stage(f"disk full ({means})", create_database(server.url))
        limit = server.limit_files
    trouble = functools.partial(_filled, disk)
    if not os.path.ismount(disk):
        trouble = functools.partial(_limited, limit)
    _play(stage, golden, times, trouble)


def read_only(make_stage: MakeStage, golden: Result, disk: Path, times: int) -> None:
    """The machine comes back with its disk read-only, as after an error; later it is mended."""
    if not os.path.ismount(disk):
        pytest.skip("this user may not mount, and modes of files stop nobody who has them open")
    stage = make_stage("disk read-only", f"sqlite:///{disk / 'x.db'}")
    _play(stage, golden, times, lambda: _remounted(stage, disk))


def _play(stage: Stage, golden: Result, times: int, trouble: Trouble) -> None:
    stage.submit()
    with stage.working(2):
        for _ in range(times):
            stage.amid_work(stage.rng.randrange(20, 150))
            stage.prove()
            before = _complaints(stage)
            with trouble():
                time.sleep(FULL_SECONDS)
            assert _complaints(stage) > before, "there was no trouble"
            stage.wait(lambda: stage.tokens() >= 0, "database")
            stage.fault()
        stage.finish()
    stage.check(golden)


def _complaints(stage: Stage) -> int:
    """How often a worker could not write: a full PostgreSQL panics, which frees a little space."""
    assert stage.fleet is not None
    return stage.fleet.count("flush.retry") + stage.fleet.count("database.away")


@contextlib.contextmanager
def _filled(disk: Path) -> Iterator[None]:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    yield
    (disk / "filler").unlink()


@contextlib.contextmanager
def _limited(limit: Callable[[int | None], None]) -> Iterator[None]:
    """No file may grow beyond a page: EFBIG, as near as it gets without a mount."""
    limit(4096)
    yield
    limit(None)


def _limit_workers(stage: Stage, most: int | None) -> None:
    assert stage.fleet is not None
    soft = resource.RLIM_INFINITY if most is None else most
    for worker in stage.fleet.workers:
        if worker.code is None:
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))


@contextlib.contextmanager
def _remounted(stage: Stage, disk: Path) -> Iterator[None]:
    """Nobody may have a file open for writing at that moment: the workers die with it."""

    def remounted() -> bool:
        assert stage.fleet is not None
        for worker in stage.fleet.workers.copy():
            worker.kill()
        return _mount(disk, "remount,ro")

    stage.wait(remounted, "read-only disk")
    yield
    assert _mount(disk, "remount,rw")


def _mount(folder: Path, options: str, kind: str | None = None) -> bool:
    what = ["-t", kind, kind] if kind else []
    command = ["mount", "-o", options, *what, str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def _keep_running(server: PostgresServer, leaving: threading.Event) -> None:
    """As a service manager would; on a full disk it ends again and again."""
    while not leaving.wait(0.2):
        if not server.running:
            with contextlib.suppress(RuntimeError):
                server.start()
