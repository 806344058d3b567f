"""A database made by an older Penstock, with rows in it, is brought up to date and goes on."""

import pytest

from orchestrator.db import database, store, views
from orchestrator.db.database import SCHEMA, SCHEMA_TABLE, Database
from orchestrator.db.store import flush
from tests.orchestrator.db.builders import claim_some, everything, rows, run, write
from tests.orchestrator.db.counts import agree

JOBS = """
INSERT INTO jobs (id, number, name, model, priority, seed, digest, n_items, n_points, n_requests,
    n_choices, created_at, planned_at, paused_at, source, spec)
VALUES ('job_{k}', {k}, 'old {k}', 'tiny', {k}, 0, 'd', 1, 5, 5, 5, '2026-01-31 12:00:00.250',
    '2026-01-31 12:00:01.000', {paused}, 'name: x',
    '{{"params": {{"messages": []}}, "graders": []}}')
"""
POINTS = "INSERT INTO points (id, job_id, position, params) VALUES ({id}, 'job_{k}', {p}, '{{}}')"
ITEMS = (
    "INSERT INTO items (id, job_id, position, custom_id, columns)"
    " VALUES ({id}, 'job_{k}', 0, '0', '{{\"a\": 1}}')"
)
REQUESTS = (
    "INSERT INTO requests (id, job_id, item_id, point_id, state, epoch, seed, n, attempt,"
    " idle_attempts, leased_until, worker_id) VALUES"
    " ({id}, 'job_{k}', {item}, {id}, '{state}', {epoch}, 7, 1, {epoch}, {idle}, {lease}, 'w')"
)
CHOICES = "INSERT INTO choices (request_id, choice, n_tokens) VALUES ({id}, 0, {n})"
CHUNKS = (
    "INSERT INTO chunks (request_id, choice, token_start, n_tokens, token_ids, text)"
    " VALUES ({id}, 0, 0, 1, {blob}, 'a')"
)
USAGE = (
    "INSERT INTO usage (request_id, attempt, prompt_tokens, cached_tokens, completion_tokens,"
    " replayed_tokens) VALUES ({id}, {attempt}, {prompt}, 2, 3, 1)"
)
STATES = ("queued", "running", "succeeded", "failed", "queued")


def fill(db: Database) -> None:
    """Two jobs of five requests in all states, one of them a suspect."""
    blob = "x'05000000'" if db.dialect == "sqlite" else "'\\x05000000'"
    for k, paused in ((1, "NULL"), (2, "'2026-01-31 13:00:00.000'")):
        run(db, JOBS.format(k=k, paused=paused))
        first = k * 10**9
        run(db, ITEMS.format(id=first, k=k))
        for p, state in enumerate(STATES):
            request_id, ran = first + p, state != "queued" or p == 4
            lease = "'2026-01-31 12:01:00.000'" if state == "running" else "NULL"
            run(db, POINTS.format(id=request_id, k=k, p=p))
            place = {"id": request_id, "k": k, "item": first, "state": state}
            idle = 2 if p == 4 else 0
            run(db, REQUESTS.format(**place, epoch=int(ran), idle=idle, lease=lease))
            run(db, CHOICES.format(id=request_id, n=int(state == "running")))
            if state == "running":
                run(db, CHUNKS.format(id=request_id, blob=blob))
                for attempt in (1, 2):
                    run(db, USAGE.format(id=request_id, attempt=attempt, prompt=4 + attempt))
    run(db, "INSERT INTO workers (id, hostname, pid, model, device, slots)"
        " VALUES ('w', 'host', 1, 'tiny', 'cpu', 8)")  # fmt: skip


@pytest.fixture(params=["0001", "0002", "0003", "0004", "0005"])
def version(request: pytest.FixtureRequest) -> str:
    """The schema before the upgrade."""
    return str(request.param)


@pytest.fixture
def old_url(empty_url: str, version: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of an old version with rows."""
    with monkeypatch.context() as patched:
        patched.setattr(database, "SCHEMA", version)
        with Database.open(empty_url) as db:
            assert rows(db, f"SELECT version_num FROM {SCHEMA_TABLE}") == [(version,)]
            fill(db)
            if version > "0001":
                run(db, "INSERT INTO turns (job_id) SELECT id FROM jobs")
    return empty_url


def test_an_old_database_goes_on_where_it_was(
    old_url: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(database, "SCHEMA", version)
        with Database.open(old_url) as db:
            before = everything(db)
            jobs = rows(db, "SELECT id, number, name, created_at, paused_at, source FROM jobs")
            status = rows(db, "SELECT * FROM job_status ORDER BY id")
    with Database.open(old_url) as db:
        assert rows(db, f"SELECT version_num FROM {SCHEMA_TABLE}") == [(SCHEMA,)]
        assert everything(db) == before
        assert rows(db, "SELECT id, number, name, created_at, paused_at, source FROM jobs") == jobs
        width = len(status[0])
        assert [row[:width] for row in rows(db, "SELECT * FROM job_status ORDER BY id")] == status
        assert rows(db, "SELECT job_id, turn FROM turns ORDER BY 1") == [("job_1", 0), ("job_2", 0)]
        agree(db)
        if version < "0005":
            assert len(rows(db, "SELECT * FROM tallies")) == 2
        if db.dialect == "sqlite":
            assert rows(db, "PRAGMA foreign_key_check") == []
            assert rows(db, "PRAGMA integrity_check") == [("ok",)]
        _go_on(db)


def _go_on(db: Database) -> None:
    """The paused job stays so; of the other, suspect, fresh and left behind are all claimed."""
    assert [job.max_attempts for job in (views.job(db, "job_1"), views.job(db, "job_2"))] == [5, 5]
    (suspect,) = claim_some(db)
    assert (suspect.request_id, suspect.idle_attempts) == (10**9 + 4, 3)
    assert store.release_expired(db) == 2
    left_behind = {c.request_id: c for c in claim_some(db)}
    assert set(left_behind) == {10**9, 10**9 + 1}
    resumed = left_behind[10**9 + 1]
    assert (resumed.epoch, resumed.choices[0].token_ids.tolist()) == (2, [5])
    assert not flush(db, [write(resumed, 1, (6,), "b")], lease_seconds=60).lost
    found = views.chunks_after(db, resumed.request_id)
    assert [(chunk.text, chunk.calls) for chunk in found] == [("a", None), ("b", None)]
    assert rows(
        db, "SELECT count(*) FROM requests WHERE end_user IS NULL AND warnings IS NULL"
    ) == [(10,)]
    agree(db)
    store.resume_job(db, "job_2")
    store.retry_failed(db, "job_2")
    assert views.job_status(db, "job_2").queued == 4
    assert views.find_job(db, "old 1") == "job_1"
    (worker,) = views.workers(db)
    assert (worker.id, worker.slots_used) == ("w", None)


def test_upgrading_twice_and_from_two_sides_is_one_upgrade(old_url: str) -> None:
    with Database.open(old_url) as one, Database.open(old_url) as other:
        one.upgrade()
        other.upgrade()
        assert len(rows(one, "SELECT * FROM turns")) == 2
