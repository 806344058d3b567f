"""Any order of claims, flushes, releases, errors, expiries, deadlines, cancellations and retries.

A model of each request in plain Python runs beside the database, on SQLite and on PostgreSQL;
after every step the rows keep the invariants: chunks contiguous from 0, counters equal their sum,
epochs never fall, whoever lost a claim has changed nothing, suspects come alone, limits hold.
Hypothesis prints the steps of a failure and a line to repeat it.
"""

import functools
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import Claimed, flush
from orchestrator.errors import Conflict
from tests.faults.harness import many
from tests.orchestrator.db.builders import claim_some, everything, rows, run, small_plan, write
from tests.orchestrator.db.counts import agree

ENDED = {"succeeded", "failed", "partial"}
POISON, MAX_ATTEMPTS, MAX_PARALLEL = 3, 4, 2
FREE, LIMITED = 3, 3  # requests of the first job, and of the second


@dataclass(slots=True)
class Known:
    """What must hold of one request."""

    tokens: list[int] = field(default_factory=list)
    epoch: int = 0
    holder: int | None = None  # the epoch of the claim that may write
    idle: int = 0
    excused: int = 0
    failures: int = 0


class Store(RuleBasedStateMachine):
    """One job without limits, one with; some claims outlive their leases."""

    claims = Bundle("claims")

    def __init__(self, db: Database) -> None:
        super().__init__()
        self.db = db
        run(db, "DELETE FROM jobs")
        limits = f"max_parallel: {MAX_PARALLEL}, max_attempts: {MAX_ATTEMPTS}, deadline: 1d"
        attempts = f"max_attempts: {MAX_ATTEMPTS}"
        self.jobs = [
            store.insert_job(db, small_plan(FREE, (0,), limits=attempts)),
            store.insert_job(db, small_plan(LIMITED, (0,), name="limited", limits=limits)),
        ]
        ids = [10**9 + k for k in range(FREE)] + [2 * 10**9 + k for k in range(LIMITED)]
        self.known = {request_id: Known() for request_id in ids}

    def mine(self, claimed: Claimed) -> bool:
        return self.known[claimed.request_id].holder == claimed.epoch

    def let_go(self, request_id: int) -> None:
        self.known[request_id].holder = None

    @rule(target=claims, limit=st.integers(1, 4), expired=st.booleans(), alone=st.booleans())
    def claim(self, limit: int, expired: bool, alone: bool) -> object:
        got = claim_some(self.db, limit, lease=-1 if expired else 60, alone=alone)
        for claimed in got:
            known = self.known[claimed.request_id]
            assert known.holder is None
            assert claimed.epoch > known.epoch
            assert claimed.choices[0].token_ids.tolist() == known.tokens
            known.holder, known.idle = claimed.epoch, known.idle + 1
            assert claimed.idle_attempts == known.idle <= POISON + known.excused
        if any(claimed.suspect for claimed in got):
            assert alone
            assert len(got) == 1
        order = [claimed.request_id for claimed in got]
        assert [i for i in order if i < 2 * 10**9] == sorted(i for i in order if i < 2 * 10**9)
        return multiple(*got)

    @rule(claimed=claims, token=st.integers(0, 999), twice=st.booleans(), end=st.booleans())
    def write_tokens(self, claimed: Claimed, token: int, twice: bool, end: bool) -> None:
        known, mine = self.known[claimed.request_id], self.mine(claimed)
        reason, outcome = ("stop", "succeeded") if end else (None, None)
        part = write(claimed, len(known.tokens), (token,), f"{token} ", end=reason, outcome=outcome)
        before = everything(self.db)
        flushed = flush(self.db, [part], lease_seconds=60)
        assert bool(flushed.lost) == (not mine)
        if not mine:
            assert everything(self.db) == before
            return
        known.tokens.append(token)
        known.idle = known.excused = known.failures = 0
        if end or flushed.cancelled:
            self.let_go(claimed.request_id)
        if twice:
            after = everything(self.db)
            again = flush(self.db, [part], lease_seconds=60)
            assert bool(again.lost) == bool(flushed.cancelled)
            assert everything(self.db) == after

    @rule(claimed=claims)
    def fail(self, claimed: Claimed) -> None:
        part = write(claimed, outcome="failed", error=("code", "why"))
        mine = self.mine(claimed)
        # Under the same epoch a failure that stands already is this very write, come twice.
        same = views.request(self.db, claimed.request_id)
        repeat = same.state == "failed" and same.epoch == claimed.epoch
        lost = flush(self.db, [part], lease_seconds=60).lost
        assert bool(lost) == (not mine and not repeat)
        if mine:
            self.let_go(claimed.request_id)

    @rule(claimed=claims)
    def release(self, claimed: Claimed) -> None:
        known, mine = self.known[claimed.request_id], self.mine(claimed)
        assert store.release(self.db, [(claimed.request_id, claimed.epoch)]) == int(mine)
        if mine:
            known.idle = max(known.idle - 1, 0)
            self.let_go(claimed.request_id)

    @rule(claimed=claims, delay=st.booleans())
    def release_after_an_error(self, claimed: Claimed, delay: bool) -> None:
        known, mine = self.known[claimed.request_id], self.mine(claimed)
        pair = (claimed.request_id, claimed.epoch)
        assert store.release(self.db, [pair], error=("x", "y"), delay=delay) == int(mine)
        if not mine:
            return
        known.failures += 1
        known.idle = known.idle - 1 if known.idle > 1 else known.idle
        self.let_go(claimed.request_id)
        found = views.request(self.db, claimed.request_id)
        if found.state != "cancelled":
            over = known.failures >= MAX_ATTEMPTS
            assert found.state == ("failed" if over else "queued")
            assert found.error_code == ("worker_error" if over else "x")
            assert (found.retry_at is not None) == (delay and not over)

    @rule(claimed=claims)
    def excuse(self, claimed: Claimed) -> None:
        """Its worker was cut off from the database, and says so now."""
        known, found = self.known[claimed.request_id], views.request(self.db, claimed.request_id)
        store.excuse(self.db, "cut off", [(claimed.request_id, claimed.epoch)])
        if found.state == "queued" and found.epoch == claimed.epoch:
            known.idle = max(known.idle - 1, 0)
        elif found.finished_at is None and found.epoch > claimed.epoch and known.idle:
            known.excused += 1

    @rule()
    def delays_pass(self) -> None:
        run(self.db, "UPDATE requests SET retry_at = created_at WHERE retry_at IS NOT NULL")

    @rule()
    def expire(self) -> None:
        store.release_expired(self.db)
        self._forget_what_came_back()

    @rule()
    def crash(self) -> None:
        store.release_worker(self.db, "w")
        self._forget_what_came_back()
        assert all(known.holder is None for known in self.known.values())

    def _forget_what_came_back(self) -> None:
        running = "SELECT id FROM requests WHERE state = 'running'"
        alive = {request_id for (request_id,) in rows(self.db, running)}
        for request_id, known in self.known.items():
            if request_id not in alive:
                known.holder = None

    @rule(transition=st.sampled_from([store.pause_job, store.resume_job]), which=st.integers(0, 1))
    def change_job(self, transition: object, which: int) -> None:
        job_id = self.jobs[which]
        try:
            transition(self.db, job_id)  # type: ignore[operator]
        except Conflict:
            cancelled = views.job(self.db, job_id).cancelled_at is not None
            assert cancelled or views.job_status(self.db, job_id).state in ENDED

    @rule(which=st.integers(0, 1))
    def retry(self, which: int) -> None:
        failed = [r.id for r in views.requests(self.db, self.jobs[which], states=["failed"])]
        try:
            assert store.retry_failed(self.db, self.jobs[which]) == len(failed)
        except Conflict:
            assert views.job(self.db, self.jobs[which]).cancelled_at is not None
            return
        for request_id in failed:
            known = self.known[request_id]
            known.idle = known.excused = known.failures = 0

    @rule(really=st.integers(0, 9), which=st.integers(0, 1))
    def cancel(self, really: int, which: int) -> None:
        if really == 0:
            self.change_job(store.cancel_job, which)

    @rule(really=st.integers(0, 9))
    def deadline_passes(self, really: int) -> None:
        if really:
            return
        run(self.db, "UPDATE jobs SET deadline_at = created_at WHERE deadline_at IS NOT NULL")
        late = self.jobs[1]
        status = views.job_status(self.db, late)
        due = status.queued + status.running and not views.job(self.db, late).cancelled_at
        assert store.expire_deadlines(self.db) == ([late] if due else [])

    @invariant()
    def rows_agree(self) -> None:
        chunks: dict[int, list[int]] = {request_id: [] for request_id in self.known}
        for request_id, start, n_tokens, blob in rows(
            self.db,
            "SELECT request_id, token_start, n_tokens, token_ids FROM chunks "
            "ORDER BY request_id, token_start",
        ):
            ids = chunks[request_id]
            assert start == len(ids)
            assert len(blob) == 4 * n_tokens
            ids += [int.from_bytes(blob[k : k + 4], "little") for k in range(0, len(blob), 4)]
        assert chunks == {request_id: known.tokens for request_id, known in self.known.items()}
        counted = dict(rows(self.db, "SELECT request_id, n_tokens FROM choices"))
        assert counted == {request_id: len(ids) for request_id, ids in chunks.items()}

    @invariant()
    def states_agree(self) -> None:
        parallel: Counter[str] = Counter()
        found = rows(
            self.db,
            "SELECT id, job_id, state, epoch, idle_attempts, excused, failures, retry_at, "
            "leased_until FROM requests",
        )
        assert len(found) == len(self.known)
        for request_id, job_id, state, epoch, idle, excused, failures, retry_at, lease in found:
            known = self.known[request_id]
            assert epoch >= known.epoch
            known.epoch = epoch
            assert known.holder == (epoch if state == "running" else None)
            assert (lease is not None) == (state == "running")
            assert retry_at is None or state == "queued"
            assert (idle, excused) == (known.idle, known.excused)
            assert failures == known.failures
            parallel[job_id] += state == "running"
        assert parallel[self.jobs[1]] <= MAX_PARALLEL
        for job_id in self.jobs:
            status = views.job_status(self.db, job_id)
            assert status.state != "cancelled" or status.queued == 0

    def teardown(self) -> None:
        agree(self.db)


@pytest.fixture(params=["sqlite", "postgresql"])
def machine_db(request: pytest.FixtureRequest, sqlite_template: Path) -> Iterator[Database]:
    """A database for many short lives; on SQLite in memory, as syncing is not tested here."""
    if request.param == "postgresql":
        yield request.getfixturevalue("postgresql_db")
        return
    memory = Path("/dev/shm")  # noqa: S108
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    shutil.copy(sqlite_template, folder / "x.db")
    with Database.open(f"sqlite:///{folder / 'x.db'}") as db:
        yield db
    shutil.rmtree(folder)


def test_any_order_of_transitions(machine_db: Database) -> None:
    run_state_machine_as_test(
        functools.partial(Store, machine_db),
        settings=settings(max_examples=40, stateful_step_count=30, deadline=None, print_blob=True),
    )


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_any_order_of_many_transitions(machine_db: Database) -> None:
    run_state_machine_as_test(
        functools.partial(Store, machine_db),
        settings=settings(
            max_examples=many(1000), stateful_step_count=60, deadline=None, print_blob=True
        ),
    )
