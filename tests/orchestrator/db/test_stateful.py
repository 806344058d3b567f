"""Any order of claims, flushes, releases, expiries, pauses, cancellations and retries.

A model of each request in plain Python runs beside the database; after every step the rows keep
the invariants: chunks contiguous from 0, counters equal their sum, epochs never fall, and whoever
lost a claim has changed nothing. Hypothesis prints the steps of a failure and a line to repeat it.
"""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import Claimed, flush
from orchestrator.errors import Conflict
from tests.orchestrator.db.builders import claim_some, everything, rows, small_plan, write

ENDED = {"succeeded", "failed", "partial"}


class Store(RuleBasedStateMachine):
    """Two workers, one job of three requests; the second worker's claims outlive its leases."""

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a folder: syncing is not what is tested here, and slow.
        memory = Path("/dev/shm")  # noqa: S108
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.db = Database.open(f"sqlite:///{self.folder / 'x.db'}")
        self.job_id = store.insert_job(self.db, small_plan(3, (0,)))
        self.epochs: dict[int, int] = {}
        self.holders: dict[int, int] = {}  # request -> the epoch of the claim that may write
        self.tokens: dict[int, list[int]] = {10**9 + position: [] for position in range(3)}

    def teardown(self) -> None:
        self.db.close()
        shutil.rmtree(self.folder)

    @rule(target=claims, limit=st.integers(1, 3), expired=st.booleans())
    def claim(self, limit: int, expired: bool) -> object:
        got = claim_some(self.db, limit, lease=-1 if expired else 60)
        for claimed in got:
            assert claimed.epoch > self.epochs.get(claimed.request_id, 0)
            assert claimed.choices[0].token_ids.tolist() == self.tokens[claimed.request_id]
            self.holders[claimed.request_id] = claimed.epoch
        return multiple(*got)

    @rule(claimed=claims, token=st.integers(0, 999), twice=st.booleans(), end=st.booleans())
    def write_tokens(self, claimed: Claimed, token: int, twice: bool, end: bool) -> None:
        mine = self.holders.get(claimed.request_id) == claimed.epoch
        known = self.tokens[claimed.request_id]
        reason, outcome = ("stop", "succeeded") if end else (None, None)
        part = write(claimed, len(known), (token,), f"{token} ", end=reason, outcome=outcome)
        before = everything(self.db)
        flushed = flush(self.db, [part], lease_seconds=60)
        assert bool(flushed.lost) == (not mine)
        if not mine:
            assert everything(self.db) == before
            return
        known.append(token)
        if end or flushed.cancelled:
            del self.holders[claimed.request_id]
        if twice:
            after = everything(self.db)
            again = flush(self.db, [part], lease_seconds=60)
            assert bool(again.lost) == bool(flushed.cancelled)
            assert everything(self.db) == after

    @rule(claimed=claims)
    def fail(self, claimed: Claimed) -> None:
        part = write(claimed, outcome="failed", error=("code", "why"))
        mine = self.holders.get(claimed.request_id) == claimed.epoch
        # Under the same epoch a failure that stands already is this very write, come twice.
        same = views.request(self.db, claimed.request_id)
        repeat = same.state == "failed" and same.epoch == claimed.epoch
        lost = flush(self.db, [part], lease_seconds=60).lost
        assert bool(lost) == (not mine and not repeat)
        if mine:
            del self.holders[claimed.request_id]

    @rule(claimed=claims)
    def release(self, claimed: Claimed) -> None:
        mine = self.holders.get(claimed.request_id) == claimed.epoch
        assert store.release(self.db, [(claimed.request_id, claimed.epoch)]) == int(mine)
        if mine:
            del self.holders[claimed.request_id]

    @rule()
    def expire(self) -> None:
        store.release_expired(self.db)
        running = "SELECT id FROM requests WHERE state = 'running'"
        alive = {request_id for (request_id,) in rows(self.db, running)}
        self.holders = {k: v for k, v in self.holders.items() if k in alive}

    @rule(transition=st.sampled_from([store.pause_job, store.resume_job, store.retry_failed]))
    def change_job(self, transition: object) -> None:
        try:
            transition(self.db, self.job_id)  # type: ignore[operator]
        except Conflict:
            cancelled = views.job(self.db, self.job_id).cancelled_at is not None
            assert cancelled or views.job_status(self.db, self.job_id).state in ENDED

    @rule(really=st.integers(0, 9))
    def cancel(self, really: int) -> None:
        if really == 0:
            self.change_job(store.cancel_job)

    @invariant()
    def rows_agree(self) -> None:
        for request_id, epoch in rows(self.db, "SELECT id, epoch FROM requests"):
            assert epoch >= self.epochs.get(request_id, 0)
            self.epochs[request_id] = epoch
            ids: list[int] = []
            for start, n_tokens, blob in rows(
                self.db,
                "SELECT token_start, n_tokens, token_ids FROM chunks "
                f"WHERE request_id = {request_id} ORDER BY token_start",
            ):
                assert start == len(ids)
                assert len(blob) == 4 * n_tokens
                ids += [int.from_bytes(blob[k : k + 4], "little") for k in range(0, len(blob), 4)]
            assert ids == self.tokens[request_id]
            (counted,) = rows(
                self.db, f"SELECT n_tokens FROM choices WHERE request_id = {request_id}"
            )
            assert counted == (len(ids),)

    @invariant()
    def states_agree(self) -> None:
        status = views.job_status(self.db, self.job_id)
        assert status.requests == 3
        running = rows(self.db, "SELECT id, epoch FROM requests WHERE state = 'running'")
        assert dict(running) == self.holders
        if status.state == "cancelled":
            assert status.queued == 0


Store.TestCase.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, print_blob=True
)
TestStore = Store.TestCase
