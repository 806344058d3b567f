"""Claims, flushes, nudges and planning, each beside its peer: `python benchmarks/claims.py`.

Three tables: claims/s and flushed tokens/s of 1 to 8 worker processes on SQLite and on PostgreSQL,
beside the limit (the same rows inserted bare, without fence, leases, counters or usage); seconds
from submit to the first stored token, through Redis and by polling alone; seconds and memory to
plan and submit 100,000 requests. Servers are those of the tests, started here.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # its servers stand in tests/

import json  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import closing, contextmanager  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from sqlalchemy import text  # noqa: E402

from orchestrator import lifecycle  # noqa: E402
from orchestrator.db import store  # noqa: E402
from orchestrator.db.database import Database  # noqa: E402
from orchestrator.queue import Queue  # noqa: E402
from orchestrator.settings import Settings  # noqa: E402
from orchestrator.spec.job import parse_job  # noqa: E402
from orchestrator.spec.plan import Plan, plan  # noqa: E402
from tests.redis_server import RedisServer  # noqa: E402
from tests.servers import PostgresServer, create_database  # noqa: E402

REQUESTS, BATCH, FLUSHES, TOKENS = 4000, 32, 4, 16
TRIALS = 60
LARGE_ITEMS, LARGE_POINTS = 10_000, 10
JOB = """
name: bench
model: {model}
dataset: {{path: {data}}}
params:
  messages: [{{role: user, content: "What is {{{{ a }}}} + 1?"}}]
  max_tokens: 8
sweep:
  seed: {seeds}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name, PostgresServer() as server:
        folder = Path(name)
        rates(folder, server)
        latency(folder)
        large(folder, server)


def rates(folder: Path, server: PostgresServer) -> None:
    """Each process claims its share, then flushes 4 chunks of 16 tokens for each claim."""
    print(f"{REQUESTS} requests, claims of {BATCH}, flushes of {BATCH} x {TOKENS} tokens")
    print(f"{'database':12}{'workers':>8}{'claims/s':>12}{'tokens/s':>12}{'/ limit':>10}")
    for kind in ("sqlite", "postgresql"):
        limit = _bare(_url(kind, folder, server))
        print(f"{kind:12}{'bare':>8}{'':12}{limit:12,.0f}{1:10.2f}", flush=True)
        for workers in (1, 2, 4, 8):
            claims, tokens = _rate(folder, _url(kind, folder, server), workers)
            ratio = tokens / limit
            print(f"{kind:12}{workers:8}{claims:12,.0f}{tokens:12,.0f}{ratio:10.2f}", flush=True)


def latency(folder: Path) -> None:
    """One idle worker; a job of one request, submitted at random moments."""
    print(f"\nsubmit to first stored token, {TRIALS} jobs of one request, one idle worker")
    print(f"{'nudge':12}{'median':>12}{'p99':>12}")
    with RedisServer() as redis:
        for label, broker in (("Redis", redis.url), ("polling", "memory://")):
            times = sorted(_latencies(_url("sqlite", folder, None), broker, folder))
            p99 = times[int(len(times) * 0.99) - 1]
            print(
                f"{label:12}{statistics.median(times) * 1e3:9.0f} ms{p99 * 1e3:9.0f} ms",
                flush=True,
            )


def large(folder: Path, server: PostgresServer) -> None:
    """From the YAML's text to a job that can be claimed, in a process of its own."""
    print(f"\n{LARGE_ITEMS * LARGE_POINTS:,} requests planned and submitted")
    print(f"{'database':12}{'seconds':>12}{'peak memory':>14}{'before':>10}")
    for kind in ("sqlite", "postgresql"):
        url = _url(kind, folder, server)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak, before = pool.apply(_submit_large, (str(folder), url))
        print(f"{kind:12}{seconds:12.1f}{peak:11.0f} MB{before:7.0f} MB", flush=True)


def _url(kind: str, folder: Path, server: PostgresServer | None) -> str:
    if kind == "postgresql":
        assert server is not None
        return create_database(server.url)
    return f"sqlite:///{folder / f'{random.getrandbits(48):x}.db'}"


def _plan(folder: Path, items: int, points: int, model: str = "bench") -> Plan:
    data = folder / f"{items}.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps({"a": n}) + "\n" for n in range(items)))
    source = JOB.format(model=model, data=data.name, seeds=list(range(points)))
    return plan(parse_job(source, file="bench.yaml", root=folder))


def _rate(folder: Path, url: str, workers: int) -> tuple[float, float]:
    with Database.open(url) as db:
        store.insert_job(db, _plan(folder, REQUESTS // 4, 4))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with context.Pool(workers, initializer=_share, initargs=(barrier,)) as pool:
        spans = pool.starmap(_work, [(url, f"w{n}") for n in range(workers)], chunksize=1)
    claimed = sum(span[0] for span in spans)
    assert claimed == REQUESTS
    claim_seconds = max(s[2] for s in spans) - min(s[1] for s in spans)
    flush_seconds = max(s[4] for s in spans) - min(s[3] for s in spans)
    return claimed / claim_seconds, claimed * FLUSHES * TOKENS / flush_seconds


def _bare(url: str) -> float:
    """Tokens/s of one process that only inserts the chunks, as many a transaction."""
    chunk = {"c": 0, "n": TOKENS, "i": bytes(4 * TOKENS), "t": "sixteen tokens of text, roughly"}
    with Database.open(url) as db:
        with db.write() as tx:
            tx.exec_driver_sql("CREATE TABLE bare AS SELECT * FROM chunks")
            tx.exec_driver_sql("CREATE UNIQUE INDEX pk ON bare (request_id, choice, token_start)")
        insert = text(
            "INSERT INTO bare (request_id, choice, token_start, n_tokens, token_ids, text)"
            " VALUES (:r, :c, :s, :n, :i, :t)"
        )
        began = time.monotonic()
        for lot in range(0, REQUESTS, BATCH):
            for number in range(FLUSHES):
                rows = [{**chunk, "r": lot + n, "s": number * TOKENS} for n in range(BATCH)]
                with db.write() as tx:
                    tx.execute(insert, rows)
        return REQUESTS * FLUSHES * TOKENS / (time.monotonic() - began)


_barrier: Any = None


def _share(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _work(url: str, name: str) -> tuple[int, float, float, float, float]:
    """How many it claimed, and when it began and ended to claim and to flush."""
    with Database.open(url) as db:
        lots: list[list[store.Claimed]] = []
        _barrier.wait()
        began = time.monotonic()
        while lot := store.claim(
            db, model="bench", worker_id=name, limit=BATCH, lease_seconds=600, alone=not lots
        ):
            lots.append(lot)
        claimed = time.monotonic()
        _barrier.wait()
        flushing = time.monotonic()
        for lot in lots:
            for number in range(FLUSHES):
                store.flush(db, [_write(each, number) for each in lot], lease_seconds=600)
        return sum(map(len, lots)), began, claimed, flushing, time.monotonic()


def _write(claimed: store.Claimed, number: int) -> store.RequestWrite:
    ids = np.arange(TOKENS, dtype=np.int32)
    last = number == FLUSHES - 1
    return store.RequestWrite(
        claimed.request_id,
        claimed.epoch,
        claimed.attempt,
        chunks=(store.ChunkWrite(0, number * TOKENS, ids, "sixteen tokens of text, roughly"),),
        ends=(store.ChoiceEnd(0, "length", "all of the text"),) if last else (),
        outcome="succeeded" if last else None,
        usage=store.UsageWrite(20, 0, (number + 1) * TOKENS, 0),
    )


def _latencies(url: str, broker: str, folder: Path) -> Iterator[float]:
    settings = Settings(database_url=url, broker_url=broker)
    one = _plan(folder, 1, 1, model="tiny")
    with Database.open(url) as db, closing(Queue(settings)) as queue, _worker(url, broker):
        for trial in range(TRIALS + 1):
            time.sleep(random.uniform(0.1, 1.2))
            began = time.monotonic()
            lifecycle.submit(db, one, queue)
            while _stored(db) <= trial:
                time.sleep(0.002)
            if trial:  # the first one waits for the worker's start
                yield time.monotonic() - began


def _stored(db: Database) -> int:
    with db.read() as rows:
        wanted = "SELECT count(*) FROM chunks WHERE token_start = 0"
        return int(rows.exec_driver_sql(wanted).scalar_one())


@contextmanager
def _worker(url: str, broker: str) -> Iterator[None]:
    env = {
        **os.environ,
        "PENSTOCK_DATABASE_URL": url,
        "PENSTOCK_BROKER_URL": broker,
        "PENSTOCK_FLUSH_SECONDS": "0.02",
        "PENSTOCK_THREADS": "1",
    }
    command = [sys.executable, "-m", "orchestrator.cli", "worker", "--model", "tiny"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _submit_large(folder: str, url: str) -> tuple[float, float, float]:
    """Seconds, and megabytes at the most and before."""
    with Database.open(url) as db:
        _plan(Path(folder), LARGE_ITEMS, 1)  # the data file, and what planning imports
        before = _megabytes()
        began = time.monotonic()
        store.insert_job(db, _plan(Path(folder), LARGE_ITEMS, LARGE_POINTS))
        return time.monotonic() - began, _megabytes(), before


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
