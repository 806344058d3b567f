"""Milliseconds to the first token of a chat through HTTP, on an idle and on a fully busy worker.

A real `penstock up` on SQLite, in a process of its own; one chat after another over one connection,
while the worker has nothing else to do, and while every slot of it is taken by a job of a file.
`row` is when somebody who does nothing but look finds the first chunk in the database: what lies
between the two is the door's own.
"""

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
from sqlalchemy import text
from stopwatch import busy_share

from orchestrator import lifecycle
from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.db.tables import ROWS_PER_JOB
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from orchestrator.terminal import print_table
from workers.folders.folder import find_model
from workers.words.chat import eos_token_ids
from workers.words.tokenizer import Tokenizer

LOOK_SECONDS = 0.001
START_SECONDS = 300.0
_URL = re.compile(r"http://127\.0\.0\.1:\d+")
_NEWEST = text("SELECT coalesce(max(number), 0) FROM jobs")
_FIRST = text("SELECT request_id FROM chunks WHERE request_id > :last LIMIT 1")


@dataclass(slots=True)
class Times:
    """Seconds from sending a chat until its first token came, and until its row was found."""

    http: list[float] = field(default_factory=list)
    row: list[float] = field(default_factory=list)


@contextmanager
def up(model: str, slots: int, database: str) -> Iterator[str]:
    """The URL of a `penstock up` that has begun to listen."""
    words = ["up", "--model", model, "--slots", str(slots), "--port", "0"]
    environment = os.environ | {"PENSTOCK_DATABASE_URL": database}
    penstock = [sys.executable, "-c", "from orchestrator.cli import main; main()"]
    process = subprocess.Popen(
        [*penstock, *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield _listening(process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _listening(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if found := _URL.search(line):
            # What it says later has to go somewhere, or it would wait for a reader.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found.group()
    raise SystemExit("penstock up has ended: " + "".join(said[-5:]))


def measured(db: Database, url: str, body: dict[str, object], count: int, warm: int) -> Times:
    """`count` chats, one after another, after `warm` that are not counted."""
    times = Times()
    with httpx.Client(base_url=url, timeout=600) as client:
        for turn in range(warm + count):
            http, row = _one(db, client, body)
            if turn >= warm:
                times.http.append(http)
                times.row.append(row)
    return times


def _one(db: Database, client: httpx.Client, body: dict[str, object]) -> tuple[float, float]:
    with db.read() as rows:
        last = rows.scalars(_NEWEST).one() * ROWS_PER_JOB + ROWS_PER_JOB - 1
    found: list[float] = []
    stopped = threading.Event()
    looking = threading.Thread(target=_look, args=(db, last, found, stopped))
    looking.start()
    began = time.perf_counter()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            parts = answer.iter_raw()
            first = next(parts)
            came = time.perf_counter()
            assert answer.status_code == 200 and first.startswith(b"data: "), first
            for _ in parts:
                pass
    finally:
        stopped.set()
        looking.join()
    return came - began, found[0] - began


def _look(db: Database, last: int, found: list[float], stopped: threading.Event) -> None:
    while True:
        with db.read() as rows:
            there = rows.execute(_FIRST, {"last": last}).first() is not None
        if there:
            found.append(time.perf_counter())
            return
        if stopped.is_set():
            raise SystemExit("a chat was answered of which there is no row")
        time.sleep(LOOK_SECONDS)


def make_busy(db: Database, settings: Settings, model: str, slots: int, requests: int) -> str:
    """A job of which none ends by itself, at work in every slot; its id."""
    folder = find_model(model, settings.models_dir)
    ends = eos_token_ids(folder.path, Tokenizer(folder.path))
    asked = {
        "name": "busy",
        "model": folder.name,
        "dataset": {"items": [{"number": number} for number in range(requests)]},
        "params": {
            "messages": [{"role": "user", "content": "Tell me of {{ number }}."}],
            "max_tokens": 256,
            "logit_bias": {str(id): -100 for id in ends},
        },
    }
    made = plan(parse_job(json.dumps(asked), file="busy.yaml", root=Path.cwd()))
    with closing(Queue(settings)) as queue:
        job_id = lifecycle.submit(db, made, queue)
    deadline = time.monotonic() + START_SECONDS
    while not any((each.slots_used or 0) >= slots for each in views.live_workers(db)):
        if time.monotonic() > deadline:
            raise SystemExit("the worker's slots did not fill")
        time.sleep(0.1)
    return job_id


def print_times(found: dict[str, Times]) -> None:
    """A line for each load: medians, p95 and p99 in milliseconds."""
    rows = []
    for load, times in found.items():
        between = [http - row for http, row in zip(times.http, times.row, strict=True)]
        cells = [load, str(len(times.http))]
        for seconds in (times.http, times.row, between):
            cells.append(f"{1000 * statistics.median(seconds):.1f}")
            cells += [f"{1000 * _share(seconds, share):.1f}" for share in (0.95, 0.99)]
        rows.append(cells)
    header = ["worker", "chats"]
    for what in ("HTTP", "row", "between"):
        header += [f"{what} ms", "p95", "p99"]
    print_table(header, rows)


def _share(seconds: list[float], share: float) -> float:
    """What that share of them does not exceed."""
    return sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="a model's folder, or its name")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--chats", type=int, default=200, help="on each load")
    parser.add_argument("--tokens", type=int, default=8, help="of each chat")
    parser.add_argument("--bulk", type=int, default=20_000, help="requests of the job beside")
    parser.add_argument("--work-folder", type=Path, help="for the database: the disk matters")
    parser.add_argument("--quick", action="store_true", help="a smoke run; means nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    chats, warm = (3, 1) if arguments.quick else (arguments.chats, 10)
    settings = Settings.from_env()
    name = find_model(arguments.model, settings.models_dir).name
    body: dict[str, object] = {
        "model": name,
        "messages": [{"role": "user", "content": "What is 31 + 44?"}],
        "max_tokens": arguments.tokens,
        "stream": True,
    }
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: Python {platform.python_version()}, {name}")
    print(f"{os.cpu_count()} cores, others take {busy_share():.0%} of the processors as it begins")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.work_folder) as folder:
        database = f"sqlite:///{folder}/penstock.db"
        with (
            up(arguments.model, arguments.slots, database) as url,
            Database.open(database) as db,
        ):
            found = {"idle": measured(db, url, body, chats, warm)}
            job = make_busy(db, settings, arguments.model, arguments.slots, arguments.bulk)
            found["busy"] = measured(db, url, body, chats, warm)
            if views.job_status(db, job).state != "running":
                raise SystemExit("the job beside was over too soon: raise --bulk")
            lifecycle.cancel(db, job)
    print_times(found)


if __name__ == "__main__":
    main()
