"""Jobs and requests page by page: a filter leaves exactly what it says, in order, once each."""

import random
from datetime import timedelta

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import Origin, UsageWrite, flush
from orchestrator.errors import NotFound
from tests.orchestrator.db.builders import claim_some, rows, run, small_plan, write

STATES = ("queued", "running", "succeeded", "failed", "cancelled")


def test_jobs_page_newest_first_by_number(db: Database) -> None:
    ids = [store.insert_job(db, small_plan(1, (0,))) for _ in range(5)][::-1]
    first = views.jobs_page(db, limit=2)
    second = views.jobs_page(db, limit=2, before=first[-1].number)
    last = views.jobs_page(db, limit=2, before=second[-1].number)
    assert [status.id for status in (*first, *second, *last)] == ids
    assert views.jobs_page(db, before=last[-1].number) == []
    assert first[0] == views.job_status(db, ids[0])


def test_jobs_page_by_what_they_are(db: Database) -> None:
    old = store.insert_job(db, small_plan(1, (0,), name="old"), Origin(owner="ann"))
    new = store.insert_job(db, small_plan(1, (0,), name="new", model="other"), Origin(owner="bob"))
    run(db, f"UPDATE jobs SET kind = 'batch' WHERE id = '{new}'")
    run(db, "UPDATE requests SET end_user = 'eve' WHERE id = 1000000000")

    def found(**by: object) -> list[str]:
        return [status.id for status in views.jobs_page(db, **{"kinds": (), **by})]  # type: ignore[arg-type]

    assert found() == [new, old]
    assert found(owner="ann") == found(name="old") == found(model="tiny") == [old]
    assert found(kinds=("job",)) == found(user="eve") == [old]
    assert found(kinds=("batch",)) == found(owner="bob") == [new]
    assert found(user="nobody") == found(owner="") == found(owner="ann", name="new") == []
    at = views.job(db, new).created_at
    assert found(since=at)[0] == new
    assert new not in found(until=at)
    assert found(since=at + timedelta(seconds=1)) == []
    assert found(until=at + timedelta(seconds=1)) == [new, old]


def test_jobs_page_by_state_looks_until_it_has_enough(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.db.listing._LOOK", 2)
    ids = [store.insert_job(db, small_plan(1, (0,))) for _ in range(9)]
    for job_id in ids[::4]:
        store.cancel_job(db, job_id)
    assert [s.id for s in views.jobs_page(db, states=("cancelled",), limit=2)] == [ids[8], ids[4]]
    assert [s.id for s in views.jobs_page(db, states=("cancelled",))] == ids[::4][::-1]
    assert len(views.jobs_page(db, states=("queued", "cancelled"))) == 9
    assert views.jobs_page(db, states=("running",)) == []


def test_only_the_owner_finds_a_job_or_its_requests(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(1, (0,)), Origin(owner="ann"))
    for owner in (None, "ann"):
        assert views.find_job(db, job_id, owner=owner) == job_id
        assert views.find_job(db, "small", owner=owner) == job_id
        assert views.find_job(db, job_id[:10], owner=owner) == job_id
        assert views.request(db, 10**9, owner=owner).job_id == job_id
    for given in (job_id, "small", job_id[:10]):
        with pytest.raises(NotFound):
            views.find_job(db, given, owner="bob")
    with pytest.raises(NotFound):
        views.request(db, 10**9, owner="bob")


def test_the_version_changes_with_the_status(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0,)))
    seen = [views.version(db, job_id)]
    assert views.version(db, job_id) == seen[0]

    def changed() -> None:
        seen.append(views.version(db, job_id))

    store.pause_job(db, job_id)
    changed()
    store.resume_job(db, job_id)
    assert views.version(db, job_id) == seen[0]
    first, second = claim_some(db)
    changed()
    flush(db, [write(first, 0, (1,), "a", usage=UsageWrite(3, 0, 1, 0))], lease_seconds=60)
    changed()
    flush(db, [write(first, outcome="failed", error=("x", "y"))], lease_seconds=60)
    changed()
    store.cancel_job(db, job_id)
    changed()
    flush(db, [write(second, end="stop", outcome="succeeded")], lease_seconds=60)
    changed()
    assert len(set(seen)) == len(seen)
    with pytest.raises(NotFound):
        views.version(db, "job_none")


def test_requests_page_by_any_filters(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain look at every request; a job before and one behind it."""
    monkeypatch.setattr("orchestrator.db.requests._LOOK", 7)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    ids = [store.insert_job(db, small_plan(20, (0, 1, 2), n=2)) for _ in range(3)]
    for claimed in claim_some(db, 300):
        outcome = chance.choice([None, "succeeded", "failed"])
        reason = chance.choice(["stop", "length"]) if outcome == "succeeded" else None
        error = (chance.choice(["x", "y"]), "why") if outcome == "failed" else None
        part = write(claimed, choice=1, end=reason, outcome=outcome, error=error)
        flush(db, [part], lease_seconds=60)
    reasons = {
        request: reason
        for request, reason in rows(
            db, "SELECT request_id, finish_reason FROM choices WHERE choice = 1"
        )
    }
    job_id = ids[1]
    everything = views.requests(db, job_id, limit=1000)
    assert [r.id for r in everything] == [2 * 10**9 + k for k in range(60)]
    for _ in range(60):
        states = chance.sample(STATES, chance.choice([0, 0, 1, 2]))
        why = chance.sample(["stop", "length"], chance.choice([0, 0, 1, 2]))
        codes = chance.sample(["x", "y"], chance.choice([0, 0, 1, 2]))
        points = chance.sample([0, 1, 2], chance.choice([0, 0, 1, 2]))
        after, limit = chance.choice([-1, 2 * 10**9 + 13]), chance.choice([3, 1000])
        expected = [
            r
            for r in everything
            if (not states or r.state in states)
            and (not why or reasons[r.id] in why)
            and (not codes or r.error_code in codes)
            and (not points or r.point_position in points)
            and r.id > after
        ]
        filters = dict(states=states, finish_reasons=why, error_codes=codes, points=points)
        found = views.requests(db, job_id, **filters, after=after, limit=limit)  # type: ignore[arg-type]
        assert found == expected[:limit], filters


def test_errors_are_counted_by_code(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(4, (0,)))
    claimed = claim_some(db)
    for one, code in zip(claimed, ("b", "a", "b", None), strict=True):
        error = (code, f"{code} of {one.request_id}") if code else None
        outcome = "failed" if code else "succeeded"
        end = None if code else "stop"
        flush(db, [write(one, end=end, outcome=outcome, error=error)], lease_seconds=60)
    first, second = (claimed[k].request_id for k in (0, 1))
    assert views.errors(db, job_id) == [
        views.ErrorGroup("b", 2, f"b of {first}", first),
        views.ErrorGroup("a", 1, f"a of {second}", second),
    ]
    store.retry_failed(db, job_id)
    assert views.errors(db, job_id) == []


def test_points_page_as_the_summary_has_them(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(3, (0, 1, 1.5, 2)))
    store.insert_job(db, small_plan(3, (0, 1)))
    first, second, third, *_ = claim_some(db, 6)
    done = [
        write(first, 0, (1, 2, 3), "abc", end="stop", outcome="succeeded"),
        write(second, 0, (1,), "a", end="stop", outcome="succeeded"),
        write(third, usage=UsageWrite(10, 0, 4, 1)),
    ]
    flush(db, done, lease_seconds=60)
    for claimed, score in ((first, 1.0), (second, 0.5)):
        store.insert_scores(db, [store.ScoreWrite(claimed.request_id, 0, "correct", score)])
    store.release_worker(db, "w")
    (again, *_) = claim_some(db, 1)
    flush(db, [write(again, usage=UsageWrite(12, 0, 4, 1))], lease_seconds=60)
    pages = [views.points_page(db, job_id, after=after, limit=3) for after in (-1, 2, 3)]
    assert [len(page) for page in pages] == [3, 1, 0]
    found, summary = [*pages[0], *pages[1]], views.points_summary(db, job_id)
    names = ("id", "position", "params", "requests", *STATES)
    names += ("prompt_tokens", "completion_tokens", "replayed_tokens")
    for one, other in zip(found, summary, strict=True):
        assert [getattr(one, n) for n in names] == [getattr(other, n) for n in names]
        for grader, scores in other.scores.items():
            values = [score for _, score in scores]
            assert one.scores[grader] == (sum(values) / len(values), len(values))
    assert found[first.request_id % 10**9 % 4].mean_tokens == 3
    assert found[3].mean_tokens is None
    with pytest.raises(NotFound):
        views.points_page(db, "job_none")


def test_choices_hold_their_chunks(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,), n=2))
    (claimed,) = claim_some(db)
    flush(db, [write(claimed, 0, (1, 2), "ab", choice=1, end="stop", whole="ab")], lease_seconds=60)
    first, second = views.choices(db, claimed.request_id)
    assert (first.choice, first.n_tokens, first.text, first.chunks) == (0, 0, None, ())
    assert (second.finish_reason, second.text) == ("stop", "ab")
    assert [chunk.text for chunk in second.chunks] == ["ab"]
    assert views.choices(db, 5) == []
