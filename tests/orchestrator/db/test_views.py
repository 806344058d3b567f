"""What is read while a job runs and after it, by functions and by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import inspect

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import ChoiceEnd, ChunkWrite, RequestWrite, UsageWrite, flush
from orchestrator.db.tables import Row
from orchestrator.errors import Conflict, NotFound
from orchestrator.spec.chunks import StoredChunk
from tests.orchestrator.db.builders import claim_some, rows, small_plan, tokens, write


def test_request_text_grows_while_the_job_runs(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0, 1)))
    claimed = claim_some(db)[3]
    text = f"SELECT * FROM request_text WHERE request_id = {claimed.request_id}"
    fixed = (claimed.request_id, claimed.job_id, "small", 1, 1, "1", 0, "running")
    assert rows(db, text) == [(*fixed, 0, None, "")]
    # Twelve chunks: starts of one and of two digits must join in the order of numbers.
    for start in range(12):
        flush(db, [write(claimed, start, (start,), f"{start} ")], lease_seconds=60)
    so_far = "".join(f"{start} " for start in range(12))
    assert rows(db, text) == [(*fixed, 12, None, so_far)]
    end = write(claimed, 12, (), "!", end="stop", whole=so_far + "!", outcome="succeeded")
    flush(db, [end], lease_seconds=60)
    assert rows(db, text) == [(*fixed[:-1], "succeeded", 12, "stop", so_far + "!")]
    assert rows(db, "SELECT text FROM choices WHERE text IS NOT NULL") == [(so_far + "!",)]


def test_tail_sees_each_chunk_once(db: Database) -> None:
    store.insert_job(db, small_plan(1, (0,), n=2))
    (claimed,) = claim_some(db)
    flush(db, [write(claimed, 0, (1, 2), "ab", choice=1)], lease_seconds=60)
    assert views.chunks_after(db, claimed.request_id) == [StoredChunk(1, 0, 2, "ab")]
    assert views.chunks_after(db, claimed.request_id, {1: 0}) == []
    flush(db, [write(claimed, 0, (3,), "c")], lease_seconds=60)
    flush(
        db, [write(claimed, 2, (), "held", choice=1, end="stop", whole="abheld")], lease_seconds=60
    )
    assert views.chunks_after(db, claimed.request_id, {1: 0}) == [
        StoredChunk(0, 0, 1, "c"),
        StoredChunk(1, 2, 0, "held"),
    ]
    assert views.chunks_after(db, claimed.request_id, {0: 0, 1: 2}) == []


def test_job_status_counts_and_sums(db: Database) -> None:
    first = store.insert_job(db, small_plan(3, (0,)))
    done, running = claim_some(db, 2)
    second = store.insert_job(db, small_plan(1, (0,), name="second"))
    usage = UsageWrite(10, 4, 1, 2)
    over = write(done, 0, (1,), "a", end="stop", whole="a", outcome="succeeded", usage=usage)
    flush(db, [over, write(running, 0, (1,), "a", usage=usage)], lease_seconds=60)
    status = views.job_status(db, first)
    assert (status.name, status.model, status.state) == ("small", "tiny", "running")
    assert (status.requests, status.queued, status.running, status.succeeded) == (3, 1, 1, 1)
    assert (status.prompt_tokens, status.completion_tokens, status.replayed_tokens) == (20, 2, 4)
    assert status.created_at.tzinfo is not None
    assert status.finished_at is None
    assert [s.id for s in views.jobs(db)] == [second, first]
    assert [s.id for s in views.jobs(db, limit=1)] == [second]
    assert rows(db, "SELECT name, state, queued FROM job_status ORDER BY name") == [
        ("second", "queued", 1),
        ("small", "running", 1),
    ]


def test_points_summary_divides_by_point(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0, 1.5)))
    first, second, *_ = claim_some(db, 2)
    flush(db, [write(first, 0, (1,), "a", usage=UsageWrite(10, 0, 1, 0))], lease_seconds=60)
    flush(db, [write(second, outcome="failed", error=("x", "y"))], lease_seconds=60)
    cold, hot = views.points_summary(db, job_id)
    assert (cold.params, hot.params) == ({"temperature": 0}, {"temperature": 1.5})
    assert (cold.requests, cold.queued, cold.running, cold.failed) == (2, 1, 1, 0)
    assert (hot.requests, hot.queued, hot.running, hot.failed) == (2, 1, 0, 1)
    assert (cold.prompt_tokens, cold.completion_tokens, hot.prompt_tokens) == (10, 1, 0)
    assert cold.scores == {}


def test_jobs_are_found_by_id_name_and_beginning(db: Database) -> None:
    old = store.insert_job(db, small_plan(1, (0,), name="daily"))
    new = store.insert_job(db, small_plan(1, (0,), name="daily"))
    assert views.find_job(db, old) == old
    assert views.find_job(db, "daily") == new
    unique = next(new[:n] for n in range(1, 21) if not old.startswith(new[:n]))
    assert views.find_job(db, unique) == new
    with pytest.raises(Conflict, match="several ids begin so"):
        views.find_job(db, "job_")
    for nothing in ("DAILY", "dail", "job%", "", "'", new + "x", new.upper()):
        with pytest.raises(NotFound):
            views.find_job(db, nothing)


def test_a_name_wins_over_a_beginning(db: Database) -> None:
    other = store.insert_job(db, small_plan(1, (0,)))
    named = store.insert_job(db, small_plan(1, (0,), name=other[:8]))
    assert views.find_job(db, other[:8]) == named
    assert views.find_job(db, other) == other


def test_results_are_whole_and_in_order(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(3, (0, 1), n=2))
    claimed = claim_some(db, 10)
    for number, one in enumerate(claimed[:4]):
        parts = RequestWrite(
            one.request_id,
            one.epoch,
            one.attempt,
            chunks=(ChunkWrite(1, 0, tokens(1, 2), "hé"), ChunkWrite(0, 0, tokens(3), "x")),
            ends=(ChoiceEnd(0, "length", "x"), ChoiceEnd(1, "stop", "hé")),
            outcome="succeeded",
            usage=UsageWrite(7, 0, 3, 0),
            system_fingerprint=f"fp_{number}",
        )
        flush(db, [parts], lease_seconds=60)
    flush(db, [write(claimed[4], outcome="failed", error=("code", "why"))], lease_seconds=60)
    store.insert_scores(db, [store.ScoreWrite(claimed[0].request_id, 1, "correct", 1.0)])
    found = list(views.results(db, job_id, page=2))
    assert [r.request_id for r in found] == [c.request_id for c in claimed]
    assert found == list(views.results(db, job_id))
    first, last = found[0], found[-1]
    assert (first.state, first.system_fingerprint, first.error) == ("succeeded", "fp_0", None)
    assert [(c.choice, c.text, c.finish_reason) for c in first.choices] == [
        (0, "x", "length"),
        (1, "hé", "stop"),
    ]
    assert first.choices[1].chunks == (StoredChunk(1, 0, 2, "hé"),)
    assert first.usage == views.UsageTotal(7, 0, 3, 0)
    assert first.scores == {"correct": {1: 1.0}}
    assert (first.created, first.seed) == (claimed[0].created, claimed[0].seed)
    assert (last.state, last.error, last.usage) == ("failed", ("code", "why"), None)
    assert (last.item_position, last.point_position, last.custom_id) == (2, 0, "2")


def test_requests_page_by_id_and_state(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(4, (0,)))
    (claimed,) = claim_some(db, 1)
    flush(db, [write(claimed, 0, (1, 2), "a")], lease_seconds=60)
    page = views.requests(db, job_id, limit=3)
    assert [r.state for r in page] == ["running", "queued", "queued"]
    assert (page[0].n_tokens, page[0].worker_id, page[0].custom_id) == (2, "w", "0")
    assert len(views.requests(db, job_id, after=page[-1].id)) == 1
    assert len(views.requests(db, job_id, states=["queued", "failed"])) == 3
    assert views.request(db, claimed.request_id) == page[0]
    with pytest.raises(NotFound, match="request '5' does not exist"):
        views.request(db, 5)


def test_the_stored_job_tells_what_was_submitted(db: Database) -> None:
    plan = small_plan(2, (0, 1), n=3)
    found = views.job(db, store.insert_job(db, plan))
    assert (found.n_items, found.n_points, found.n_requests, found.n_choices) == (2, 2, 4, 12)
    assert (found.source, found.digest, found.seed) == (
        plan.spec.source,
        plan.spec.digest,
        plan.spec.seed,
    )
    assert set(found.spec) == {"params", "graders", "limits", "dataset"}
    assert views.graders(db, found.id) == list(plan.spec.graders)


def test_the_same_job_is_known_by_name_and_content(db: Database) -> None:
    plan = small_plan(1, (0,))
    ids = [store.insert_job(db, plan) for _ in range(2)]
    store.insert_job(db, small_plan(2, (0,)))
    assert views.same_jobs(db, "small", plan.spec.digest) == ids[::-1]
    assert views.same_jobs(db, "other", plan.spec.digest) == []


DOCUMENTED = (Path(__file__).parents[3] / "docs" / "database.md").read_text(encoding="utf-8")


def entry(token: str, logprob: float) -> dict[str, object]:
    """As the API shows it."""
    return {
        "token": token,
        "logprob": logprob,
        "bytes": list(token.encode()),
        "top_logprobs": [],
    }


def test_the_documented_queries_answer_while_a_job_runs(db: Database) -> None:
    store.insert_job(db, small_plan(2, (0, 1), name="arithmetic"))
    done, running, *_ = claim_some(db, 2)
    over = write(done, 0, (1,), "a", end="stop", whole="a", outcome="succeeded")
    usage = UsageWrite(9, 0, 2, 0)
    entries = [entry("h", -0.5), entry("éllo", -3.25)]
    calls = [{"index": 0, "name": "f", "arguments": ""}]
    chunk = ChunkWrite(0, 0, tokens(1, 2), "héllo", entries, calls)
    flush(db, [over, replace(write(running, usage=usage), chunks=(chunk,))], lease_seconds=60)
    store.insert_scores(db, [store.ScoreWrite(done.request_id, 0, "correct", 0.5)])
    queries = re.findall(r"```sql\n(.*?)```", DOCUMENTED, re.DOTALL)
    progress, text, accuracy, *two_kinds = queries
    rarest = two_kinds[db.dialect == "postgresql"]
    with db.read() as connection:
        assert [tuple(row) for row in connection.exec_driver_sql(progress)] == [
            ("arithmetic", "running", 1, 4, 2)
        ]
        assert [tuple(row) for row in connection.exec_driver_sql(text)] == [("0", 1, 0, 2, "héllo")]
        ((position, _, grader, n, mean),) = connection.exec_driver_sql(accuracy)
        assert [tuple(row) for row in connection.exec_driver_sql(rarest)] == [
            (running.request_id, 0, "éllo", -3.25),
            (running.request_id, 0, "h", -0.5),
        ]
    assert (position, grader, n, mean) == (0, "correct", 1, 0.5)


def test_every_table_and_the_views_columns_are_documented(db: Database) -> None:
    for name in Row.metadata.tables:
        assert f"| `{name}` |" in DOCUMENTED
    with db.read() as connection:
        for view in ("job_status", "request_text"):
            columns = [column["name"] for column in inspect(connection).get_columns(view)]
            assert f"`{view}({', '.join(columns)})`" in DOCUMENTED
