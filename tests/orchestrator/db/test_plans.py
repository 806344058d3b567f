"""A plan becomes rows once and whole, or not at all."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.db import plans, store, views
from orchestrator.db.database import Database
from orchestrator.errors import NotFound, SpecError
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import Plan, PlannedRequest, plan
from tests.orchestrator.db.builders import claim_some, rows, run, small_plan

COUNTS = (
    "SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM points), "
    "(SELECT count(*) FROM items), (SELECT count(*) FROM requests), "
    "(SELECT count(*) FROM choices)"
)


class Torn(Plan):
    """A plan whose stream breaks off after some requests."""

    def requests(self) -> Iterator[PlannedRequest]:
        for request in super().requests():
            if request.position == 5:
                raise OSError("the dataset's disk is gone")
            yield request


class Changed(Plan):
    """A plan whose dataset has grown shorter since it was counted."""

    def requests(self) -> Iterator[PlannedRequest]:
        return (request for request in super().requests() if request.position < 5)


class Doubled(Plan):
    """A plan that gives every item the same custom_id."""

    def requests(self) -> Iterator[PlannedRequest]:
        for request in super().requests():
            item = dataclasses.replace(request.item, custom_id="same")
            yield dataclasses.replace(request, item=item)


def as_kind(kind: type[Plan], base: Plan) -> Plan:
    return kind(base.spec, base.points, base.n_items)


def test_every_row_stands_where_its_position_says(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "BATCH", 4)  # an item's points fall into different batches
    store.insert_job(db, small_plan(1, (0,)))
    planned = small_plan(3, (0, 0.5, 1), n=2)
    job_id = store.insert_job(db, planned)
    number = rows(db, f"SELECT number FROM jobs WHERE id = '{job_id}'")[0][0]
    assert number == 2
    first = number * 10**9
    found = rows(
        db,
        "SELECT id, item_id, point_id, seed, n, state, epoch, attempt, idle_attempts "
        f"FROM requests WHERE job_id = '{job_id}' ORDER BY id",
    )
    assert found == [
        (
            first + r.position,
            first + r.item.position,
            first + r.point.position,
            r.seed,
            2,
            "queued",
            0,
            0,
            0,
        )
        for r in planned.requests()
    ]
    items = f"SELECT position, custom_id FROM items WHERE job_id = '{job_id}' ORDER BY id"
    assert rows(db, items) == [(0, "0"), (1, "1"), (2, "2")]
    choices = f"SELECT choice, n_tokens, text FROM choices WHERE request_id >= {first}"
    assert sorted(rows(db, choices)) == sorted([(k, 0, None) for k in (0, 1)] * 9)


def test_any_text_survives_the_way_into_the_database(db: Database) -> None:
    columns = {
        "a": "tab\t, line\nbreak, \\ \\N \\. \" ' é 😀 \0 \ud83d",
        "b": [1, None, {"c": 0.5}],
    }
    base = small_plan(1, (0,))

    class Strange(Plan):
        def requests(self) -> Iterator[PlannedRequest]:
            for request in super().requests():
                item = dataclasses.replace(request.item, custom_id="a\tb\\n é", columns=columns)
                yield dataclasses.replace(request, item=item, user="a\0\\N b")

    job_id = store.insert_job(db, as_kind(Strange, base))
    (claimed,) = claim_some(db)
    assert claimed.columns == columns
    run(db, "UPDATE requests SET state = 'failed'")
    (result,) = views.results(db, job_id, user="a\0\\N b")
    assert result.user == ("a\0\\N b" if db.dialect == "sqlite" else "a\ufffd\\N b")
    assert views.request(db, claimed.request_id).custom_id == "a\tb\\n é"


def test_each_request_knows_for_whom_it_is(db: Database) -> None:
    text = """
name: users
model: tiny
dataset: {items: [{who: "ann"}, {who: "b' é"}, {who: ""}]}
params:
  messages: [{role: user, content: hello}]
  user: "{{ who }}"
sweep: {include: [{temperature: 0}, {temperature: 1, user: fixed}]}
"""
    job_id = store.insert_job(db, plan(parse_job(text, file="x.yaml", root=Path.cwd())))
    stored = [user for (user,) in rows(db, "SELECT end_user FROM requests ORDER BY id")]
    assert stored == ["ann", "fixed", "b' é", "fixed", "", "fixed"]
    store.insert_job(db, small_plan(1, (0,)))
    assert rows(db, "SELECT end_user FROM requests ORDER BY id")[-1] == (None,)
    run(db, "UPDATE requests SET state = 'failed'")
    for user, positions in (
        ("ann", [0]),
        ("b' é", [1]),
        ("fixed", [0, 1, 2]),
        ("", [2]),
        ("x", []),
    ):
        found = list(views.results(db, job_id, user=user, page=2))
        assert [result.item_position for result in found] == positions
    assert [r.user for r in views.results(db, job_id, page=2)] == stored


@pytest.mark.parametrize(
    "kind, error", [(Torn, OSError), (Changed, SpecError), (Doubled, SpecError)]
)
def test_a_plan_that_breaks_off_leaves_nothing(
    db: Database, kind: type[Plan], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "BATCH", 2)
    with pytest.raises(error):
        store.insert_job(db, as_kind(kind, small_plan(4, (0, 1))))
    assert rows(db, COUNTS) == [(0, 0, 0, 0, 0)]


def test_a_killed_planner_leaves_nothing_to_claim_or_see(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "BATCH", 2)
    monkeypatch.setattr(plans, "_remove", lambda *_: None)  # the process is gone
    with pytest.raises(OSError):
        store.insert_job(db, as_kind(Torn, small_plan(4, (0, 1))))
    (job_id,) = rows(db, "SELECT id FROM jobs")[0]
    assert rows(db, COUNTS) == [(1, 2, 2, 4, 4)]
    assert claim_some(db) == []
    assert views.claimable(db, "tiny") == 0
    assert views.jobs(db) == []
    for look in (views.find_job, views.job, views.job_status, store.cancel_job):
        with pytest.raises(NotFound):
            look(db, job_id)
    for view in ("job_status", "request_text"):
        assert rows(db, f"SELECT * FROM {view}") == []
    monkeypatch.undo()
    assert store.remove_unplanned(db) == 0
    whole = store.insert_job(db, small_plan())
    assert store.remove_unplanned(db, older_than_seconds=-1) == 1
    assert [status.id for status in views.jobs(db)] == [whole]
    assert rows(db, COUNTS) == [(1, 2, 2, 4, 4)]


def test_a_job_removed_while_it_is_planned_is_an_error(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Removed(Plan):
        def requests(self) -> Iterator[PlannedRequest]:
            yield from super().requests()
            store.remove_unplanned(db, older_than_seconds=-1)

    monkeypatch.setattr(plans, "BATCH", 4)
    with pytest.raises(Exception, match="was removed while it was being planned"):
        store.insert_job(db, as_kind(Removed, small_plan(4, (0,))))
    assert rows(db, COUNTS) == [(0, 0, 0, 0, 0)]


def test_jobs_inserted_at_once_get_numbers_of_their_own(db: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: store.insert_job(db, small_plan()), range(8)))
    assert len(set(ids)) == 8
    assert rows(db, "SELECT number FROM jobs ORDER BY number") == [(k,) for k in range(1, 9)]
    assert len(claim_some(db)) == 32


def test_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for nanoseconds in range(10**18, 4 * 10**18, 10**16):
        monkeypatch.setattr(plans.time, "time_ns", lambda at=nanoseconds: at)
        ids.append(plans.new_job_id())
    assert ids == sorted(ids)
    assert all(len(job_id) == 20 and job_id.startswith("job_") for job_id in ids)


def test_twenty_thousand_requests(db: Database, tmp_path: Path) -> None:
    (tmp_path / "big.jsonl").write_text("".join(f'{{"a": {k}}}\n' for k in range(5000)))
    text = """
name: big
model: tiny
dataset: {path: big.jsonl}
params:
  messages: [{role: user, content: "What is {{ a }}?"}]
sweep: {temperature: [0, 0.5, 1, 1.5]}
"""
    planned = plan(parse_job(text, file="big.yaml", root=tmp_path))
    job_id = store.insert_job(db, planned)
    assert rows(db, COUNTS) == [(1, 4, 5000, 20_000, 20_000)]
    assert rows(db, "SELECT min(id), max(id) FROM requests") == [(10**9, 10**9 + 19_999)]
    assert views.claimable(db, "tiny") == views.job_status(db, job_id).queued == 20_000
