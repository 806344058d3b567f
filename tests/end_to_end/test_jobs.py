"""Every job in jobs/ plans, runs to the end on `tiny`, and exports what it counted."""

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.db import views
from orchestrator.db.database import Database
from tests.end_to_end.inside import penstock
from tests.orchestrator.db.builders import rows

JOBS = Path(__file__).parents[2] / "jobs"
FILES = sorted(JOBS.glob("*.yaml"))
SMALL = 1000  # requests; all of today's are


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def job(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """What `penstock plan` says of the job, in a folder that holds a copy of jobs/."""
    shutil.copytree(JOBS, tmp_path / "jobs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PENSTOCK_THREADS", "1")
    monkeypatch.delenv("PENSTOCK_DATABASE_URL", raising=False)
    ended = penstock("plan", f"jobs/{request.param.name}", "--json")
    assert (ended.code, ended.err) == (0, "")
    planned = json.loads(ended.out)
    assert isinstance(planned, dict)
    assert [path.name for path in tmp_path.iterdir()] == ["jobs"]
    return planned | {"file": f"jobs/{request.param.name}"}


def test_there_are_some() -> None:
    assert {"quickstart", "echo"} <= {file.stem for file in FILES}


def test_runs_to_the_end_and_exports_what_it_counted(job: dict[str, object]) -> None:
    assert job["model"] == "tiny"
    n_requests, bound = job["n_requests"], job["max_total_tokens"]
    assert isinstance(n_requests, int) and isinstance(bound, int)
    assert 0 < n_requests <= SMALL

    ended = penstock("run", str(job["file"]))
    assert ended.code == 0, ended.err
    assert f"requests: {n_requests} succeeded, 0 failed" in ended.out

    exported = penstock("export", str(job["name"]), "-o", "out.jsonl")
    assert exported.code == 0, exported.err
    text = Path("out.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == n_requests
    assert all(line["error"] is None for line in lines)

    with Database.open("sqlite:///penstock.db") as db:
        status = views.job_status(db, views.find_job(db, str(job["name"])))
        graders = {grader.name for grader in views.graders(db, status.id)}
        ((choices, tokens),) = rows(db, "SELECT count(*), sum(n_tokens) FROM choices")
        ((chunks,),) = rows(db, "SELECT sum(length(token_ids)) / 4 FROM chunks")
    assert (status.state, status.succeeded) == ("succeeded", n_requests)
    assert tokens == chunks == status.completion_tokens <= bound
    assert choices == job["n_choices"] == sum(len(line["completion"]["choices"]) for line in lines)
    usage = [line["completion"]["usage"] for line in lines]
    assert sum(each["completion_tokens"] for each in usage) == tokens
    assert sum(each["prompt_tokens"] for each in usage) == status.prompt_tokens
    assert graders and all(set(line["scores"]) == graders for line in lines)
    given = {len(line["completion"]["choices"]) for line in lines}
    assert given == {len(scores) for line in lines for scores in line["scores"].values()}
