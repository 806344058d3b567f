"""Laws of batches, on both databases: what is checked, what ends where, and that a kill is nothing.

A hand ends the requests in a worker's place; with a worker: `test_batches.py`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import batches, files, lifecycle
from orchestrator.batches import Batches, advance, look
from orchestrator.db import batches as batch_rows
from orchestrator.db import files as file_rows
from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.errors import Conflict, NotFound
from tests.api.batching import OUTCOMES, answers, entered, jsonl, line, looking_after, work
from tests.orchestrator.db.builders import rows, run

Json = dict[str, Any]


@pytest.fixture
def my(db: Database, tmp_path: Path) -> Iterator[Batches]:
    with looking_after(db, tmp_path / "files") as made:
        yield made


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("BATCH_SEED", random.randrange(2**32)))
    print(f"BATCH_SEED={seed}")
    return random.Random(seed)


def test_every_custom_id_once(my: Batches, rng: random.Random) -> None:
    """Whatever becomes of the requests, each has one line, in the file of its kind."""
    count = rng.randrange(1, 40)
    wanted = [f"id {rng.random()} \u2028 ü" for _ in range(count)]
    batch_id = entered(my, jsonl(line(each) for each in wanted))
    assert look(my) == 1
    assert batch_rows.batch(my.db, batch_id).status == "in_progress"
    job_id = batch_rows.batch(my.db, batch_id).job_id
    assert job_id is not None
    work(my.db, rng.randrange(count + 1), rng)
    how = rng.choice(["completed", "cancelled", "expired"])
    if how == "completed":
        work(my.db, count, rng)
    elif how == "cancelled":
        batch_rows.cancel_batch(my.db, batch_id)
    else:
        run(my.db, "UPDATE jobs SET deadline_at = created_at")
    unended = rows(my.db, "SELECT count(*) FROM requests WHERE finished_at IS NULL")[0][0]
    look(my)
    batch = batch_rows.batch(my.db, batch_id)
    # A deadline that passes after all have ended has cancelled nothing.
    assert batch.status == ("completed" if how == "expired" and not unended else how)
    output, errors = answers(my, batch)
    assert sorted(each["custom_id"] for each in (*output, *errors)) == sorted(wanted)
    states = dict(
        rows(
            my.db,
            "SELECT i.custom_id, coalesce(r.error_code, r.state) FROM requests r"
            " JOIN items i ON i.id = r.item_id",
        )
    )
    assert {each["custom_id"]: _kind(each) for each in (*output, *errors)} == {
        custom_id: _KINDS[state] for custom_id, state in states.items()
    }
    assert all(_kind(each) == 200 for each in output)
    assert all(_kind(each) != 200 for each in errors)
    assert len({each["id"] for each in (*output, *errors)}) == count
    assert (batch.output_file_id is None, batch.error_file_id is None) == (not output, not errors)


_KINDS = {
    "succeeded": 200,
    "context_length_exceeded": 400,
    "poison": 500,
    "cancelled": "batch_cancelled",
    "deadline": "batch_expired",
}
assert set(OUTCOMES) < set(_KINDS)


def _kind(answer: Json) -> object:
    assert set(answer) == {"id", "custom_id", "response", "error"}
    if answer["response"] is None:
        assert set(answer["error"]) == {"code", "message"}
        return answer["error"]["code"]
    assert answer["error"] is None
    assert set(answer["response"]) == {"status_code", "request_id", "body"}
    status, body = answer["response"]["status_code"], answer["response"]["body"]
    if status == 200:
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"] == "abc"
        assert body["usage"]["completion_tokens"] == 3
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}
    return status


def test_cancelled_before_it_was_validated(my: Batches) -> None:
    batch_id = entered(my, jsonl([line("a")]))
    batch_rows.cancel_batch(my.db, batch_id)
    batch_rows.cancel_batch(my.db, batch_id)  # once more is no error
    look(my)
    assert batch_rows.batch(my.db, batch_id).status == "cancelled"
    assert rows(my.db, "SELECT id FROM jobs") == []
    with pytest.raises(Conflict):
        batch_rows.cancel_batch(my.db, batch_id)


def test_its_job_cancelled_or_gone(my: Batches) -> None:
    """By another door: the batch ends all the same."""
    first, second = entered(my, jsonl([line("a")])), entered(my, jsonl([line("a")]))
    look(my)
    job_id = batch_rows.batch(my.db, first).job_id
    assert job_id is not None
    lifecycle.cancel(my.db, job_id)
    run(my.db, f"DELETE FROM jobs WHERE id = '{batch_rows.batch(my.db, second).job_id}'")
    look(my)
    assert batch_rows.batch(my.db, first).status == "cancelled"
    gone = batch_rows.batch(my.db, second)
    assert gone.status == "failed"
    assert gone.errors is not None
    assert gone.errors[0]["code"] == "job_removed"


def test_retried_while_its_files_are_written(my: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that runs again is not left out: the files wait for it."""
    batch_id = entered(my, jsonl([line("a"), line("b")]))
    look(my)
    batch = batch_rows.batch(my.db, batch_id)
    work(my.db, 2, "poison")
    finalize = batch_rows.finalize_batch

    def retried(db: Database, id: str) -> None:
        finalize(db, id)
        store.retry_failed(db, str(batch.job_id))

    monkeypatch.setattr(batch_rows, "finalize_batch", retried)
    look(my)
    monkeypatch.undo()
    assert batch_rows.batch(my.db, batch_id).status == "finalizing"
    assert rows(my.db, "SELECT id FROM files WHERE purpose = 'batch_output'") == []
    assert list(my.folder.glob(".*")) == []
    work(my.db, 2)
    look(my)
    batch = batch_rows.batch(my.db, batch_id)
    assert batch.status == "completed"
    assert [each["custom_id"] for each in answers(my, batch)[0]] == ["a", "b"]


def test_one_that_cannot_go_on_holds_up_no_other(my: Batches) -> None:
    bad, good = entered(my, jsonl([line("a")])), entered(my, jsonl([line("a")]))
    path = files.place(my.folder, batch_rows.batch(my.db, bad).input_file_id)
    path.unlink()
    path.mkdir()  # reading it is an error that nobody expects
    look(my)
    assert batch_rows.batch(my.db, bad).status == "validating"
    assert batch_rows.batch(my.db, good).status == "in_progress"


def test_a_leased_batch_is_left_alone(my: Batches) -> None:
    batch_id = entered(my, jsonl([line("a")]))
    assert batch_rows.lease_batch(my.db, batch_id, 60) is not None
    assert look(my) == 0
    assert not advance(my, batch_id)
    batch_rows.unlease_batch(my.db, batch_id)
    assert look(my) == 1


def test_the_input_file_stays_while_it_is_needed(my: Batches) -> None:
    """It can neither be deleted nor expire before the batch has ended; then it does."""
    batch_id = entered(my, jsonl([line("a")]))
    file_id = batch_rows.batch(my.db, batch_id).input_file_id
    run(my.db, "UPDATE files SET expires_at = created_at")
    batches.expire_files(my)
    assert files.place(my.folder, file_id).exists()
    look(my)
    with pytest.raises(NotFound):  # past its time for whoever asks
        file_rows.delete_file(my.db, file_id)
    run(my.db, "UPDATE files SET expires_at = NULL")
    with pytest.raises(Conflict):
        file_rows.delete_file(my.db, file_id)
    work(my.db, 1)
    look(my)
    run(my.db, f"UPDATE files SET expires_at = created_at WHERE id = '{file_id}'")
    batches.expire_files(my)
    assert not files.place(my.folder, file_id).exists()
    assert rows(my.db, f"SELECT id FROM files WHERE id = '{file_id}'") == []


def test_owners(my: Batches) -> None:
    """Another owner's batch and file do not exist; their results belong to the batch's owner."""
    batch_id = entered(my, jsonl([line("a")]), owner="ann")
    look(my)
    work(my.db, 1)
    look(my)
    batch = batch_rows.batch(my.db, batch_id, owner="ann")
    assert rows(my.db, "SELECT DISTINCT owner, kind FROM jobs") == [("ann", "batch")]
    assert file_rows.file(my.db, str(batch.output_file_id), owner="ann").owner == "ann"
    assert batch_rows.batches_page(my.db, owner="bob") == []
    assert file_rows.files_page(my.db, owner="bob") == []
    for refused in (
        lambda: batch_rows.batch(my.db, batch_id, owner="bob"),
        lambda: batch_rows.cancel_batch(my.db, batch_id, owner="bob"),
        lambda: batch_rows.batches_page(my.db, owner="bob", after=batch_id),
        lambda: file_rows.file(my.db, batch.input_file_id, owner="bob"),
        lambda: file_rows.delete_file(my.db, batch.input_file_id, owner="bob"),
        lambda: file_rows.files_page(my.db, owner="bob", after=batch.input_file_id),
    ):
        with pytest.raises(NotFound):
            refused()


def test_pages_join_to_the_whole(my: Batches, rng: random.Random) -> None:
    """In whatever steps, also where several were made at one instant."""
    made = [entered(my, b"") for _ in range(7)]
    for table in ("batches", "files"):
        run(my.db, f"UPDATE {table} SET created_at = '2030-01-01 00:00:00.123000'")
    step = rng.randrange(1, 5)
    assert set(_pages(batch_rows.batches_page, my.db, step)) == set(made)
    newest = _pages(file_rows.files_page, my.db, step)
    oldest = _pages(file_rows.files_page, my.db, step, oldest_first=True)
    assert len(set(newest)) == 7
    assert newest == oldest[::-1]


def _pages(page: Callable[..., list[Any]], db: Database, step: int, **how: Any) -> list[str]:
    found: list[str] = []
    while got := page(db, limit=step, after=found[-1] if found else None, **how):
        found += [each.id for each in got]
    return found


def test_strays_are_swept(my: Batches) -> None:
    """Parts and bytes without a row go when they are old; what has a row stays."""
    batch_id = entered(my, jsonl([line("a")]))
    known = files.place(my.folder, batch_rows.batch(my.db, batch_id).input_file_id)
    part, stray = my.folder / ".0.part", my.folder / files.new_id("file-")
    young, foreign = my.folder / files.new_id("file-"), my.folder / "readme"
    for path in (part, stray, young, foreign):
        path.write_bytes(b"x")
    for path in (known, part, stray, foreign):
        os.utime(path, (1, 1))
    batches.sweep_files(my)
    assert sorted(my.folder.iterdir()) == sorted((known, young, foreign))


def test_the_same_result_is_the_same_line(my: Batches) -> None:
    """Files written twice are the same twice: nothing in them is drawn."""
    batch_id = entered(my, jsonl([line("a"), line("b")]))
    look(my)
    work(my.db, 1, "poison")
    work(my.db, 1)
    look(my)
    batch = batch_rows.batch(my.db, batch_id)
    ended = json.dumps(answers(my, batch))
    run(my.db, "UPDATE batches SET completed_at = NULL, output_file_id = NULL")
    look(my)
    assert json.dumps(answers(my, batch_rows.batch(my.db, batch_id))) == ended
