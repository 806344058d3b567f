"""One job, a fleet of real workers, a fault, and what must be true afterwards.

`Stage` is where it happens: a database, a broker, real processes. `Stage.play` submits the job,
lets the fault befall it, waits until every job is at its end, and compares the rows with the
invariants and with a run that nothing disturbed. What it measured is one row of the table.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from orchestrator import lifecycle
from orchestrator.db.database import BUSY_SECONDS, Database
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.faults import invariants
from tests.faults.processes import Fleet, Launcher, Process

LEASE_SECONDS = 2.0
WAIT_SECONDS = float(os.environ.get("FAULT_WAIT_SECONDS", "90"))
SETTINGS = {
    "PENSTOCK_LEASE_SECONDS": str(LEASE_SECONDS),
    "PENSTOCK_FLUSH_SECONDS": "0.05",
    "PENSTOCK_POLL_SECONDS": "0.2",
    "PENSTOCK_THREADS": "1",
    "PENSTOCK_LOG": "info",
    "FAULT_STEP_SECONDS": "0.005",
    "FAULT_RECONCILE_SECONDS": "0.5",
}
JOB = """
name: faults
model: tiny
dataset:
  items:
    - {task: "Repeat exactly: Zoë 🙂🚀 ñandú 🎉🎈 crème brûlée 🐙"}
    - {task: "Repeat exactly: 🙂🙃🙂🙃 à la carte 🎉"}
    - {task: "What is 31 + 44?"}
    - {task: "Extract as JSON with keys name, age, city: Anna is 31 years old and lives in Rome."}
    - {task: "Write in upper case: planetarium"}
    - {task: "Reverse the word: tangerine"}
params:
  messages: [{role: user, content: "{{ task }}"}]
  max_tokens: MAX_TOKENS
  n: CHOICES
  logprobs: true
  top_logprobs: 2
  stop: ["xq", "zz", "🎉🎈 c"]
  frequency_penalty: 0.1
sweep:
  temperature: [0.7, 1.6]
  seed: [SEEDS]
"""


def many(times: int) -> int:
    """How often a fault comes in the long form; fewer by FAULT_TIMES, to try it."""
    return min(times, int(os.environ.get("FAULT_TIMES", times)))


def job_text(seed: int, seeds: int = 4, *, max_tokens: int = 48, n: int = 2) -> str:
    """The job; its requests' seeds follow from `seed`."""
    rng = random.Random(seed)
    drawn = ", ".join(str(rng.randrange(2**31)) for _ in range(seeds))
    text = JOB.replace("MAX_TOKENS", str(max_tokens)).replace("CHOICES", str(n))
    return text.replace("SEEDS", drawn)


@dataclass(slots=True)
class Row:
    """One row of the table in docs/reliability.md."""

    fault: str
    place: str
    seed: int
    times: int = 0
    recovered: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Pending:
    """A fault that is not recovered from; see `Stage.recovery`."""

    row: Row
    since: float
    held: dict[int, int]
    tokens: int


class Stage:
    """A database with its jobs, and the fleet that works on them."""

    def __init__(
        self,
        launcher: Launcher,
        folder: Path,
        database_url: str,
        broker_url: str = "memory://",
        *,
        job: str,
        row: Row,
        worker_url: str | None = None,
    ) -> None:
        """`worker_url`: the database as the workers see it, where that is another way."""
        folder.mkdir(exist_ok=True)
        self.launcher, self.folder, self.row, self.rows = launcher, folder, row, [row]
        self.rng = random.Random(f"{row.seed} {row.fault} {row.place}")
        self.settings = Settings(database_url=database_url, broker_url=broker_url)
        self.env = {
            **SETTINGS,
            "PENSTOCK_DATABASE_URL": worker_url or database_url,
            "PENSTOCK_BROKER_URL": broker_url,
        }
        if broker_url.startswith("redis"):
            self.env["FAULT_BROKER"] = str(row.seed)
        self.plan = plan(parse_job(job, file="job.yaml", root=folder))
        (folder / "job.yaml").write_text(job, encoding="utf-8")
        with Database.open(database_url) as db:
            self.dialect = db.dialect
        driver = database_url.replace("postgresql://", "postgresql+psycopg://")
        busy: dict[str, Any] = {"timeout": BUSY_SECONDS} if self.dialect == "sqlite" else {}
        # A connection for each look: no look finds one that a fault has cut.
        self.engine = create_engine(driver, poolclass=NullPool, connect_args=busy)
        invariants.watch(self.engine)
        self.jobs: list[int] = []
        self._pending: list[_Pending] = []
        self.fleet: Fleet | None = None

    @contextmanager
    def working(self, workers: int = 2, **env: str) -> Iterator[Fleet]:
        """A fleet at work for the time of the block, killed at its end."""
        self.fleet = Fleet(self.launcher, self.folder, workers, {**self.env, **env})
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watcher.start()
        try:
            yield self.fleet
        finally:
            over.set()
            watcher.join()
            self.fleet.close()

    def next_row(self, fault: str) -> None:
        """Faults from now on are another row of the table."""
        self.row = Row(fault, self.row.place, self.row.seed)
        self.rows.append(self.row)

    def submit(self) -> None:
        """The job once more, as `penstock submit` does it."""
        url = self.settings.database_url
        with Database.open(url) as db, closing(Queue(self.settings)) as queue:
            lifecycle.submit(db, self.plan, queue)
        self.note_jobs()

    def note_jobs(self) -> None:
        """Find the jobs that are planned."""
        found = self.query("SELECT number FROM jobs WHERE planned_at IS NOT NULL ORDER BY number")
        self.jobs = [row[0] for row in found]

    def query(self, sql: str, **values: object) -> list[tuple[Any, ...]]:
        """What a person's SQL sees."""
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(sql), values)]

    def tokens(self) -> int:
        """Persisted tokens of all jobs."""
        return int(self.query("SELECT coalesce(sum(n_tokens), 0) FROM choices")[0][0])

    @property
    def over(self) -> bool:
        """Nothing is left to do."""
        return self.query("SELECT count(*) FROM requests WHERE finished_at IS NULL") == [(0,)]

    def amid_work(self, new_tokens: int = 40) -> None:
        """Wait until that many more tokens are persisted; submit again when there is too little."""
        goal = self.tokens() + new_tokens
        self.wait(lambda: self.tokens() >= goal or self.over, f"{new_tokens} new tokens")
        if self.over:
            self.submit()
            self.amid_work(new_tokens)

    def keep_busy(self) -> bool:
        """Submit again when nothing is left to do; False, for what waits for something else."""
        if self.over:
            self.submit()
        return False

    def wait(self, ready: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Until it is ready; raises TimeoutError, with everything that was said."""
        deadline = time.monotonic() + seconds
        while not self._is(ready):
            if time.monotonic() > deadline:
                states = "SELECT state, error_code, count(*) FROM requests GROUP BY 1, 2"
                said = self.fleet.said() if self.fleet else ""
                self.row.violations.append(f"no {what} in {seconds} s")
                raise TimeoutError(
                    f"{self.row.fault}, seed {self.row.seed}: no {what} in {seconds} s; "
                    f"{self.query(states)}\n{said}"
                )
            time.sleep(0.03)

    def _is(self, ready: Callable[[], bool]) -> bool:
        try:
            return ready()
        except DBAPIError:  # the fault may have taken the database
            return False

    def finish(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait until every job is at its end and every fault is recovered from."""
        self.wait(lambda: self.over, "end of the jobs", seconds)
        self.wait(lambda: not self._pending, "recovery")

    def prove(self) -> None:
        """Wait until no request has been claimed twice in vain: what whole fleets die of three
        times, without a new token, is poison by definition, guilty or not."""
        twice = "SELECT count(*) FROM requests WHERE finished_at IS NULL AND idle_attempts > 1"
        self.wait(lambda: self.query(twice) == [(0,)], "end of suspicion")

    def kill(self, worker: Process, sign: int = signal.SIGKILL) -> None:
        """Kill, and count it as recovered when all that it held is in other hands."""
        self.fault(self.held(worker))
        worker.signal(sign)
        if sign == signal.SIGKILL:
            worker.wait()

    def held(self, worker: Process) -> dict[int, int]:
        """Request -> epoch of what a worker has claimed."""
        return dict(
            self.query(
                "SELECT r.id, r.epoch FROM requests r JOIN workers w ON w.id = r.worker_id "
                "WHERE w.pid = :pid AND r.state = 'running' AND w.stopped_at IS NULL",
                pid=worker.pid,
            )
        )

    def fault(self, held: dict[int, int] | None = None) -> None:
        """A fault begins or ends now: recovered when `held` is in other hands, or without it
        when there are new tokens (or nothing is left to do)."""
        self.row.times += 1
        tokens = self.tokens() if held is None else -1
        self._pending.append(_Pending(self.row, time.monotonic(), held or {}, tokens))

    def check(self, golden: invariants.Result, guilty: Mapping[int, str] | None = None) -> None:
        """Every invariant, and every job equal to the golden one; the rows keep what is broken."""
        self.note_jobs()
        found = invariants.violations(self.engine, self.jobs, golden, guilty=guilty)
        for row in self.rows:
            row.violations += found
        assert not found, f"seed {self.row.seed}: " + "\n".join(found[:10])

    def close(self) -> None:
        self.engine.dispose()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(0.05):
            for pending in list(self._pending):
                if self._is(lambda pending=pending: self._recovered(pending)):
                    pending.row.recovered.append(time.monotonic() - pending.since)
                    self._pending.remove(pending)

    def _recovered(self, pending: _Pending) -> bool:
        if pending.tokens >= 0:
            return self.tokens() > pending.tokens or self.over
        if not pending.held:
            return True
        low, high = min(pending.held), max(pending.held)
        now = self.query(
            "SELECT id, epoch, state FROM requests WHERE id BETWEEN :low AND :high",
            low=low,
            high=high,
        )
        return not any(
            epoch == pending.held.get(id) and state in ("running", "queued")
            for id, epoch, state in now
        )
