"""What the fault tests share: launcher, servers of their own, the undisturbed run, the table."""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults import failpoints, invariants
from tests.faults.harness import Row, Stage, job_text
from tests.faults.processes import Launcher
from tests.redis_server import RedisServer
from tests.servers import PostgresServer

MakeStage = Callable[..., Stage]
GoldenRun = Callable[[str], invariants.Result]


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="session")
def fault_seed() -> int:
    """Drawn anew for each session; all jobs and plans of faults follow from it."""
    return int(os.environ.get("FAULT_SEED", random.randrange(2**32)))


@pytest.fixture(scope="session")
def job(fault_seed: int) -> str:
    """The job of all fault tests."""
    return job_text(fault_seed)


@pytest.fixture(scope="session")
def golden_run(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> GoldenRun:
    """A job's results on one worker that nothing disturbs."""
    known: dict[str, invariants.Result] = {}

    def run(job: str) -> invariants.Result:
        if job not in known:
            folder = tmp_path_factory.mktemp("golden")
            row = Row("none", "sqlite", 0)
            stage = Stage(launcher, folder, f"sqlite:///{folder / 'x.db'}", job=job, row=row)
            stage.submit()
            with stage.working(1, FAULT_STEP_SECONDS="0"):
                stage.finish()
            known[job] = invariants.result(stage.engine, 1)
            stage.check(known[job])
        return known[job]

    return run


@pytest.fixture(scope="session")
def golden(golden_run: GoldenRun, job: str) -> invariants.Result:
    """What `job` comes to without any fault."""
    return golden_run(job)


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may kill."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A Redis that the test may kill."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def make_stage(
    request: pytest.FixtureRequest,
    launcher: Launcher,
    tmp_path: Path,
    job: str,
    fault_seed: int,
) -> Iterator[MakeStage]:
    """`make_stage(fault, url, broker)`: a stage whose row goes into the table when the test ends.

    `url` may be `sqlite` or `postgresql`, for a database of its own. The row's seed is printed;
    FAULT_SEED=N repeats it. With Redis every nudge of every process is lost, late, doubled or
    behind a later one.
    """
    stages: list[Stage] = []
    calm: list[Callable[[], None]] = []

    def make(fault: str, url: str, broker: str = "memory://", **more: object) -> Stage:
        if url == "sqlite":
            url = f"sqlite:///{tmp_path / 'penstock.db'}"
        elif url == "postgresql":
            url = str(request.getfixturevalue("postgresql_url"))
        place = url.partition(":")[0] + (" + redis" if broker.startswith("redis") else "")
        row = Row(fault, place, fault_seed)
        print(f"FAULT_SEED={fault_seed}")
        if broker.startswith("redis") and not calm:
            calm.append(failpoints.disturb_nudges(random.Random(fault_seed)))
        more = {"job": job, **more}
        stages.append(Stage(launcher, tmp_path, url, broker, row=row, **more))  # type: ignore[arg-type]
        return stages[-1]

    yield make
    for undo in calm:
        undo()
    for stage in stages:
        stage.close()
        for row in stage.rows:
            if row.times:
                _note(row)


def _note(row: Row) -> None:
    """Print the row, and keep it where FAULT_TABLE says: `tests.faults.reliability` reads it."""
    slowest = f"{max(row.recovered):.1f} s" if row.recovered else "-"
    print(
        f"{row.fault} on {row.place}: {row.times} times, {len(row.recovered)} recoveries, "
        f"slowest {slowest}, {len(row.violations)} violations"
    )
    if file := os.environ.get("FAULT_TABLE"):
        with Path(file).open("a", encoding="utf-8") as table:
            table.write(json.dumps(asdict(row)) + "\n")
