"""Tallies equal the counts, whatever happens to a job, whoever writes; folding changes nothing."""

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.db import store, tallies, views
from orchestrator.db.database import Database
from orchestrator.db.store import Claimed, UsageWrite, flush
from orchestrator.errors import Conflict, NotFound
from tests.orchestrator.db.builders import claim_some, pairs, rows, run, small_plan, write
from tests.orchestrator.db.counts import STATES, agree


def writes(chance: random.Random, claimed: list[Claimed]) -> list[store.RequestWrite]:
    """Usage of some, the end of some."""
    made = []
    for one in claimed:
        outcome = chance.choice([None, None, "succeeded", "failed"])
        usage = UsageWrite(*(chance.randrange(50) for _ in range(4)))
        made.append(
            write(
                one,
                outcome=outcome,
                end="stop" if outcome == "succeeded" else None,
                error=("x", "y") if outcome == "failed" else None,
                usage=usage if chance.random() < 0.8 else None,
            )
        )
    return made


class Steps:
    """Transitions in any order, several jobs at once."""

    def __init__(self, db: Database, chance: random.Random) -> None:
        self.db, self.chance = db, chance
        self.claims: list[Claimed] = []

    def job(self) -> str:
        return str(self.chance.choice(rows(self.db, "SELECT id FROM jobs"))[0])

    def plan(self) -> None:
        store.insert_job(self.db, small_plan(self.chance.randint(1, 5), (0, 1)))

    def claim(self) -> None:
        self.claims += claim_some(self.db, self.chance.randint(1, 6), lease=60)

    def flush(self) -> None:
        some = {c.request_id: c for c in self.chance.sample(self.claims, len(self.claims) // 2)}
        flush(self.db, writes(self.chance, list(some.values())), lease_seconds=60)

    def release(self) -> None:
        error = self.chance.choice([None, ("x", "y")])
        store.release(self.db, pairs(self.claims[-3:]), error=error)

    def kill(self) -> None:
        store.release_worker(self.db, "w")

    def expire(self) -> None:
        run(self.db, "UPDATE requests SET leased_until = created_at WHERE state = 'running'")
        store.release_expired(self.db)

    def change(self) -> None:
        change: Any = self.chance.choice(
            [store.pause_job, store.resume_job, store.retry_failed, store.cancel_job]
        )
        with contextlib.suppress(Conflict):
            change(self.db, self.job())

    def deadline(self) -> None:
        run(self.db, f"UPDATE jobs SET deadline_at = created_at WHERE id = '{self.job()}'")
        store.expire_deadlines(self.db)

    def by_hand(self) -> None:
        """A person's SQL."""
        some = f"SELECT id FROM requests WHERE id - id / 7 * 7 = {self.chance.randrange(7)}"
        run(
            self.db,
            self.chance.choice(
                [
                    f"UPDATE requests SET state = 'failed' WHERE id IN ({some})",
                    f"DELETE FROM usage WHERE request_id IN ({some}) AND attempt = 1",
                    f"UPDATE usage SET prompt_tokens = 3, replayed_tokens = 9 "
                    f"WHERE request_id IN ({some})",
                    "DELETE FROM requests WHERE id IN "
                    "(SELECT max(id) FROM requests WHERE started_at IS NULL)",
                ]
            ),
        )

    def fold(self) -> None:
        if self.chance.random() < 0.5:
            run(self.db, "UPDATE tallies SET second = 10 WHERE second > 0")
        tallies.fold(self.db)

    def remove(self) -> None:
        if len(rows(self.db, "SELECT id FROM jobs")) > 1 and self.chance.random() < 0.3:
            run(self.db, f"DELETE FROM jobs WHERE id = '{self.job()}'")
            self.claims = []

    def one(self) -> str:
        steps = [self.plan, self.change, self.deadline, self.by_hand, self.remove, self.expire]
        often = [self.claim, self.flush, self.release, self.kill, self.fold]
        step = self.chance.choice(steps + 3 * often)
        step()
        return step.__name__


@pytest.mark.parametrize("trial", range(4))
def test_after_any_steps_the_tallies_are_the_counts(db: Database, trial: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    steps = Steps(db, random.Random(seed))
    steps.plan()
    for _ in range(60):
        name = steps.one()
        print(name)
        agree(db)


def test_a_prompt_counts_once_however_often_it_was_computed(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(1, (0,)))
    most = 0
    for prompt in (10, 7, 12, 12, 3):
        (claimed,) = claim_some(db)
        for tokens in (1, 2):
            usage = UsageWrite(prompt, prompt // 2, tokens, 1)
            flush(db, [write(claimed, claimed.attempt - 1, usage=usage)], lease_seconds=60)
            most = max(most, prompt)
            status = views.job_status(db, job_id)
            assert (status.prompt_tokens, status.cached_tokens) == (most, most // 2)
            agree(db)
        store.release(db, pairs([claimed]))
    for attempt in (3, 1, 4, 2, 5):
        run(db, f"DELETE FROM usage WHERE attempt = {attempt}")
        agree(db)
    status = views.job_status(db, job_id)
    assert (status.prompt_tokens, status.completion_tokens, status.replayed_tokens) == (0, 0, 0)


def test_a_removed_job_leaves_no_tallies_to_the_next_of_its_number(db: Database) -> None:
    store.insert_job(db, small_plan())
    flush(db, [write(c, usage=UsageWrite(5, 1, 2, 3)) for c in claim_some(db)], lease_seconds=60)
    run(db, "DELETE FROM jobs")
    assert rows(db, "SELECT * FROM tallies") == []
    run(db, "INSERT INTO tallies (number, queued) VALUES (1, 99)")  # as a fold may just leave one
    job_id = store.insert_job(db, small_plan())
    assert views.job(db, job_id).number == 1
    agree(db)


def test_many_write_and_fold_at_once(db: Database) -> None:
    """No worker waits for another's tallies, and none is lost while they are folded."""
    store.insert_job(db, small_plan(60, (0,)))
    ended, start = threading.Event(), threading.Barrier(5)

    def work(number: int) -> None:
        start.wait()
        while claimed := claim_some(db, 3, worker=f"w{number}"):
            for tokens in (1, 2):
                usage = UsageWrite(5, 0, tokens, 0)
                flush(db, [write(c, usage=usage) for c in claimed], lease_seconds=60)
            done = [write(c, end="stop", outcome="succeeded") for c in claimed]
            assert not flush(db, done, lease_seconds=60).lost

    def fold() -> None:
        start.wait()
        while not ended.is_set():
            run(db, "UPDATE tallies SET second = second - 200 WHERE second > 1000")
            tallies.fold(db)
            seen = views.jobs(db)[0]
            assert seen.requests == 60 == sum(getattr(seen, state) for state in STATES)

    with ThreadPoolExecutor(5) as pool:
        folding = pool.submit(fold)
        for each in [pool.submit(work, number) for number in range(4)]:
            each.result()
        ended.set()
        folding.result()
    agree(db)
    tallies.fold(db)
    agree(db)
    assert views.jobs(db)[0].state == "succeeded"


def test_folding_leaves_few_rows(db: Database) -> None:
    store.insert_job(db, small_plan(40, (0,)))
    while claimed := claim_some(db, 1):
        flush(db, [write(c, end="stop", outcome="succeeded") for c in claimed], lease_seconds=60)
    run(db, "UPDATE tallies SET second = 10 * id")
    assert tallies.fold(db) > 0 or db.dialect == "sqlite"
    assert len(rows(db, "SELECT * FROM tallies")) == 1
    agree(db)
    assert tallies.fold(db) == 0


def test_the_pace_is_that_of_the_last_minute(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(10, (0,)))
    assert views.pace(db, job_id) == views.Pace(None, None, None)
    usage = UsageWrite(5, 0, 30, 0)
    done = [write(c, end="stop", outcome="succeeded", usage=usage) for c in claim_some(db, 4)]
    flush(db, done, lease_seconds=60)
    found = views.pace(db, job_id)
    assert found.requests_per_second is not None and found.seconds_left is not None
    assert found.tokens_per_second == pytest.approx(30 * found.requests_per_second)
    assert found.seconds_left * found.requests_per_second == pytest.approx(6)
    run(db, "UPDATE tallies SET second = 0")
    assert views.pace(db, job_id) == views.Pace(0.0, 0.0, None)
    store.cancel_job(db, job_id)
    assert views.pace(db, job_id) == views.Pace(None, None, 0.0)
    with pytest.raises(NotFound):
        views.pace(db, "job_none")


def test_the_first_start_and_the_last_end(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,)))
    assert views.job_status(db, job_id).started_at is None
    first, second = claim_some(db, 2)
    began = views.request(db, first.request_id).started_at
    assert views.job_status(db, job_id).started_at == began
    for claimed in (second, first):
        flush(db, [write(claimed, end="stop", outcome="succeeded")], lease_seconds=60)
    status = views.job_status(db, job_id)
    assert status.started_at == began
    ends = [views.request(db, c.request_id).finished_at for c in (first, second)]
    assert status.finished_at == max(at for at in ends if at is not None)
