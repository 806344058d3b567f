"""An export equals a replay, line by line; its file is there whole or not at all."""

import io
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import ChoiceEnd, ChunkWrite, RequestWrite, ScoreWrite, UsageWrite
from orchestrator.errors import PenstockError, SpecError
from orchestrator.export import export, whole_file
from orchestrator.follow import request_chunks
from orchestrator.spec.chunks import fold
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.end_to_end.inside import penstock
from tests.orchestrator.db.builders import claim_some, small_plan, tokens, write

USAGE = UsageWrite(prompt_tokens=7, cached_tokens=2, completion_tokens=3, replayed_tokens=1)


def lines(db: Database, job_id: str) -> list[dict[str, Any]]:
    out = io.StringIO()
    count = export(views.results(db, job_id), out, lambda count: None)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert count == len(found)
    return found


def test_each_ended_request_is_a_line_and_open_ones_are_not(db: Database) -> None:
    job_id = store.insert_job(db, small_plan(2, (0, 1)))
    good, bad, _, running = claim_some(db)
    store.flush(
        db,
        [
            write(good, 0, (1, 2), "a\u2028\x85\N{GRINNING FACE}", usage=USAGE),
            write(running, 0, (1,), "x"),
            write(bad, 0, (5,), "half", outcome="failed", error=("context", "too long")),
        ],
        lease_seconds=60,
    )
    whole = "a\u2028\x85\N{GRINNING FACE}!"
    end = write(good, 2, (3,), "!", end="stop", whole=whole, outcome="succeeded", usage=USAGE)
    store.flush(db, [end], lease_seconds=60)
    store.insert_scores(db, [ScoreWrite(good.request_id, 0, "correct", 1.0)])

    first, second = lines(db, job_id)
    assert first.keys() == second.keys()
    completion = first.pop("completion")
    assert first == {
        "custom_id": "0",
        "job": {"id": job_id, "name": "small"},
        "item": {"a": 0},
        "point": {"temperature": 0},
        "request_id": good.request_id,
        "seed": good.seed,
        "user": None,
        "state": "succeeded",
        "error": None,
        "usage": {
            "prompt_tokens": 7,
            "cached_tokens": 2,
            "completion_tokens": 3,
            "replayed_tokens": 1,
        },
        "scores": {"correct": [1.0]},
    }
    assert completion["object"] == "chat.completion"
    assert completion["system_fingerprint"] == "fp_test"
    assert completion["choices"][0]["message"]["content"] == whole
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert (completion["usage"]["prompt_tokens"], completion["usage"]["total_tokens"]) == (7, 10)
    assert second["completion"] is None
    assert second["error"] == {"code": "context", "message": "too long"}
    assert second["scores"] == {}


JOB = """
name: full
model: tiny
params:
  messages: [{role: user, content: hello}]
  n: 2
  logprobs: true
  service_tier: auto
  stream_options: {include_usage: true}
"""


def entry(token: str) -> dict[str, object]:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


def test_an_export_is_the_fold_of_the_replay(sqlite_db: Database) -> None:
    db = sqlite_db
    job_id = store.insert_job(db, plan(parse_job(JOB, file="x.yaml", root=Path.cwd())))
    (claimed,) = claim_some(db)
    fence = (claimed.request_id, claimed.epoch, claimed.attempt)
    held = ChunkWrite(1, 1, tokens(), "d", [entry("d")])
    first = (ChunkWrite(1, 0, tokens(4), "c", [entry("c")]), ChunkWrite(0, 0, tokens(1), "", []))
    store.flush(db, [RequestWrite(*fence, chunks=first, usage=USAGE)], lease_seconds=60)
    ends = (ChoiceEnd(0, "length", ""), ChoiceEnd(1, "stop", "cd"))
    last = RequestWrite(*fence, chunks=(held,), ends=ends, outcome="succeeded", usage=USAGE)
    store.flush(db, [last], lease_seconds=60)

    replayed = list(request_chunks(db, claimed.request_id))
    (exported,) = lines(db, job_id)
    assert exported["completion"] == fold(replayed)
    assert replayed[-1]["usage"]["completion_tokens"] == 3
    completion = exported["completion"]
    assert completion["service_tier"] == "default"
    assert [c["message"]["content"] for c in completion["choices"]] == ["", "cd"]
    assert completion["choices"][1]["logprobs"]["content"] == [entry("c"), entry("d")]
    assert exported["scores"] == {}


USERS = """
name: users
model: tiny
dataset:
  items: [{who: ann}, {who: bob}, {who: "ann "}]
params:
  messages: [{role: user, content: hello}]
  user: "{{ who }}"
"""


def test_an_export_of_one_user_holds_those_requests_alone(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database.open(sqlite_url) as db:
        store.insert_job(db, plan(parse_job(USERS, file="x.yaml", root=Path.cwd())))
        claimed = claim_some(db)
        ended = [write(each, end="stop", outcome="succeeded") for each in claimed[:2]]
        store.flush(db, ended, lease_seconds=60)
    monkeypatch.setenv("PENSTOCK_DATABASE_URL", sqlite_url)
    everybody, ann = penstock("export", "users"), penstock("export", "users", "--user", "ann")
    users = [json.loads(line)["user"] for line in everybody.out.splitlines()]
    assert users == ["ann", "bob"]
    assert ann.out == everybody.out.splitlines(keepends=True)[0]
    assert everybody.err == "exported 2 requests; 1 have not ended\n"
    assert ann.err == "exported 1 requests of user ann\n"


def test_a_file_appears_whole_with_the_usual_rights_and_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with whole_file(path) as out:
        out.write("new\n")
        assert path.read_text() == "old"
    assert path.read_text() == "new\n"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_an_interrupted_export_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as out:
        out.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_link_is_followed_and_a_pipe_is_written_straight(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    with whole_file(link) as out:
        out.write("x")
    assert link.is_symlink() and target.read_text() == "x"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    with whole_file(pipe) as out:
        out.write("through")
    reader.join(10)
    assert got == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="a folder that exists"), whole_file(tmp_path / "no" / "x"):
        pass
    with pytest.raises(SpecError, match="a file"), whole_file(tmp_path):
        pass
    with (
        pytest.raises(PenstockError, match=r"cannot write .*: No space left on device"),
        whole_file(Path("/dev/full")) as out,
    ):
        out.write("x" * 100_000)
