"""kill -9 in the middle of calls and of JSON: run again, they end as if nothing had happened."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.end_to_end.test_tools import RECORD, TOOLS

KILLS = 4
OPEN_CALLS = (
    "SELECT count(*) FROM choices AS c WHERE finish_reason IS NULL AND EXISTS (SELECT 1 FROM chunks"
    " AS k WHERE k.request_id = c.request_id AND k.choice = c.choice AND k.calls IS NOT NULL)"
)
MADE = (
    "SELECT r.item_id % 1000000000, r.point_id % 1000000000, c.choice, c.finish_reason, c.text,"
    " coalesce(k.token_ids, x''), coalesce(k.text, ''), k.calls, k.logprobs FROM choices AS c"
    " JOIN requests AS r ON r.id = c.request_id"
    " LEFT JOIN chunks AS k ON c.request_id = k.request_id AND c.choice = k.choice"
    " ORDER BY c.request_id, c.choice, k.token_start"
)


def job(seed: int) -> dict[str, Any]:
    text = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
    tools = [*TOOLS, {"type": "function", "function": {"name": "long", "parameters": text}}]
    wanted = {"type": "json_schema", "json_schema": {"name": "r", "schema": RECORD}}
    points = [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "long"}}},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "response_format": wanted},
    ]
    return {
        "name": "killed",
        "model": "tiny",
        "seed": seed,
        "dataset": {"items": [{"k": k} for k in range(12)]},
        "params": {
            "messages": [{"role": "user", "content": "What is the weather in Oslo and {{ k }}?"}],
            "temperature": 1.5,
            "max_tokens": 160,
            "n": 2,
            "logprobs": True,
            "stop": ["zz"],
            "tools": tools,
        },
        "sweep": {"include": points},
    }


class Place:
    """`penstock run job.yaml --resume` in a folder."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        folder.mkdir()
        (folder / "job.yaml").write_text(json.dumps(job, ensure_ascii=False))
        self.folder, self.database = folder, folder / "penstock.db"

    def start(self) -> subprocess.Popen[bytes]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        more = {"PENSTOCK_FLUSH_SECONDS": "0.01", "PENSTOCK_SLOTS": "8", "PENSTOCK_THREADS": "1"}
        command = [sys.executable, "-m", "orchestrator.cli", "run", "job.yaml", "--resume"]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env={**kept, **more}, stdout=log, stderr=log
            )

    def finish(self) -> None:
        assert self.start().wait(timeout=200) == 0, (self.folder / "log").read_text()[-3000:]

    def count(self, sql: str) -> int:
        try:
            with closing(sqlite3.connect(self.database, timeout=30)) as connection:
                return int(connection.execute(sql).fetchone()[0] or 0)
        except sqlite3.OperationalError:  # no tables yet
            return 0

    def result(self) -> dict[tuple[int, int, int], Any]:
        """Everything of each choice, whatever its chunks were."""
        found: dict[tuple[int, int, int], Any] = {}
        with closing(sqlite3.connect(self.database)) as connection:
            for *key, reason, whole, ids, text, calls, entries in connection.execute(MADE):
                made = found.setdefault(tuple(key), [reason, whole, b"", "", {}, []])
                made[2] += ids
                made[3] += text
                for call in json.loads(calls or "[]"):
                    name, arguments = made[4].get(call["index"], ("", ""))
                    name += call.get("name", "")
                    made[4][call["index"]] = name, arguments + call["arguments"]
                made[5] += json.loads(entries or "[]")
        return found


def kill_in_a_call(place: Place) -> bool:
    """Start, wait for new tokens and a call that is open, kill; False if it was over before."""
    tokens = "SELECT sum(n_tokens) FROM choices"
    before, process = place.count(tokens), place.start()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if place.count(tokens) > before and place.count(OPEN_CALLS):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return place.count(OPEN_CALLS) > 0


def test_killed_in_the_middle_of_a_call_it_goes_on_to_the_same(tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    golden, killed = Place(tmp_path / "golden", job(seed)), Place(tmp_path / "killed", job(seed))
    golden.finish()
    kills = sum(kill_in_a_call(killed) for _ in range(KILLS))
    assert kills > 0
    killed.finish()
    assert killed.count("SELECT max(attempt) FROM requests") > 1
    assert killed.count("SELECT sum(replayed_tokens) FROM usage") > 0
    wanted = golden.result()
    assert killed.result() == wanted and len(wanted) == 96
    calls = [made[4] for made in wanted.values() if made[4]]
    assert len(calls) > 40
