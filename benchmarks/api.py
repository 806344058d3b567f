"""The reads behind the status API, at any size: `python benchmarks/api.py [--requests N]`.

Makes one job of N requests (a million by default) of ten chunks each in bulk, and a thousand small
ones beside it, on SQLite and on a PostgreSQL that it starts. Prints the median and the 99th
percentile of each read, beside it a full count as the peer; then, over HTTP, of the status route,
of the job's page and of its grid, the large job's beside a small one's; then of what is kept once
the job is graded. The time to a first token is measured by `first_token.py`.
"""

# ruff: noqa: S608 - every word of the SQL stands in this file

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # its servers stand in tests/

import argparse  # noqa: E402
import multiprocessing  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import closing  # noqa: E402
from http.client import HTTPConnection  # noqa: E402
from typing import Any  # noqa: E402

from sqlalchemy import text  # noqa: E402

from orchestrator.db import kept, leftovers, store, tallies, views  # noqa: E402
from orchestrator.db.database import Database  # noqa: E402
from orchestrator.queue import Queue  # noqa: E402
from orchestrator.settings import Settings  # noqa: E402
from orchestrator.spec.job import parse_job  # noqa: E402
from orchestrator.spec.plan import Plan, plan  # noqa: E402
from tests.servers import PostgresServer, create_database  # noqa: E402

REQUESTS, CHUNKS, POINTS, SMALL_JOBS = 1_000_000, 10, 10, 1000
LOT, CLIENTS = 20_000, 4
JOB = """
name: {name}
model: tiny
dataset: {{items: [{{a: 1}}]}}
params: {{messages: [{{role: user, content: "What is {{{{ a }}}}?"}}], max_tokens: 160}}
sweep: {{seed: {seeds}}}
graders: [{{name: correct, type: equals, expected: "1"}}]
"""
# Of a hundred requests one has failed and four are queued; k counts requests, the job is number 1.
_LOT = "WITH RECURSIVE n (k) AS (SELECT {a} UNION ALL SELECT k + 1 FROM n WHERE k + 1 < {b}) "
_STATE = "CASE WHEN k % 100 = 0 THEN 'failed' WHEN k % 100 < 5 THEN 'queued' ELSE 'succeeded' END"
_ENDED, _DONE = "k % 100 NOT BETWEEN 1 AND 4", "k % 100 > 4"
_FILL = (
    "INSERT INTO items (id, job_id, position, custom_id, columns) SELECT 1000000000 + k / {p}, "
    "'{job}', k / {p}, CAST(k / {p} AS TEXT), '{{\"a\": 1}}' FROM n WHERE k % {p} = 0 AND k >= {p}",
    "INSERT INTO requests (id, job_id, item_id, point_id, state, seed, n, attempt, error_code, "
    "error_message, started_at, finished_at) SELECT 1000000000 + k, '{job}', 1000000000 + k / {p}, "
    f"1000000000 + k % {{p}}, {_STATE}, k, 1, 1, CASE WHEN k % 100 = 0 THEN 'template' END, "
    f"CASE WHEN k % 100 = 0 THEN 'no column' END, {{now}}, CASE WHEN {_ENDED} THEN {{now}} END "
    "FROM n WHERE k >= {p}",
    "INSERT INTO choices (request_id, choice, n_tokens, finish_reason, text) SELECT "
    f"1000000000 + k, 0, CASE WHEN {_DONE} THEN 160 ELSE 0 END, CASE WHEN {_DONE} THEN "
    "CASE WHEN k % 1000 = 7 THEN 'length' ELSE 'stop' END END, "
    f"CASE WHEN {_DONE} THEN 'the whole of its text' END FROM n WHERE k >= {{p}}",
    "INSERT INTO usage (request_id, attempt, prompt_tokens, cached_tokens, completion_tokens, "
    f"replayed_tokens) SELECT 1000000000 + k, 1, 20, 4, 160, 0 FROM n WHERE {_DONE} AND k >= {{p}}",
    "INSERT INTO scores (request_id, choice, grader, score) SELECT 1000000000 + k, 0, 'correct', "
    f"k % 3 FROM n WHERE {_DONE} AND k >= {{p}}",
    "INSERT INTO chunks (request_id, choice, token_start, n_tokens, token_ids, text, position) "
    "SELECT 1000000000 + k, 0, c.s * 16, 16, {blob}, 'sixteen tokens of text, or roughly so', "
    f"c.s * 16 FROM n CROSS JOIN ({{starts}}) AS c WHERE {_DONE} AND k >= {{p}}",
)
_COUNTED = """
SELECT count(*), sum(CASE WHEN r.state = 'succeeded' THEN 1 ELSE 0 END),
    (SELECT sum(u.completion_tokens) FROM usage AS u
     WHERE u.request_id >= 1000000000 AND u.request_id < 2000000000)
FROM requests AS r WHERE r.job_id = :job
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=REQUESTS)
    options.add_argument("--only", choices=("sqlite", "postgresql"))
    options.add_argument("--quick", action="store_true", help="a smoke run of 2,000 requests")
    asked = options.parse_args()
    size = 2000 if asked.quick else asked.requests
    small, times = (20, 10) if asked.quick else (SMALL_JOBS, 500)
    with tempfile.TemporaryDirectory() as folder, PostgresServer() as server:
        for kind in ("sqlite", "postgresql"):
            if asked.only in (None, kind):
                sqlite = f"sqlite:///{folder}/api.db"
                url = sqlite if kind == "sqlite" else create_database(server.url)
                one(kind, url, size, small, times)


def one(kind: str, url: str, size: int, small: int, times: int) -> None:
    """One database's table."""
    with Database.open(url) as db:
        began = time.monotonic()
        job_id = make(db, size, small)
        seconds = time.monotonic() - began
        print(f"\n{kind}: {size:,} requests, {size * CHUNKS:,} chunks, made in {seconds:.0f} s")
        print(f"{'read':32}{'median':>12}{'p99':>12}")
        for name, read in reads(db, job_id, size).items():
            few = times if name not in ("points_page", "a full count (peer)") else min(times, 5)
            show(name, [_seconds(read) for _ in range(few)])
    over_http(url, job_id, 1.0 if times < 100 else 10.0)
    with Database.open(url) as db:
        began = time.monotonic()
        grade(db, job_id)
        print(f"graded, its points counted and kept in {time.monotonic() - began:.1f} s")
        show(
            "points_page, graded",
            [_seconds(lambda: views.points_page(db, job_id)) for _ in range(times)],
        )


def grade(db: Database, job_id: str) -> None:
    """What a reconciler does once all has ended; what was queued is cancelled before."""
    with db.write() as tx:
        queued = "UPDATE requests SET state = 'cancelled' WHERE job_id = :job AND state = 'queued'"
        tx.execute(text(queued), {"job": job_id})
    leftovers.mark_graded(db, job_id)
    kept.keep_points(db, job_id, least=1)


def reads(db: Database, job_id: str, size: int) -> dict[str, Callable[[], object]]:
    """What a client asks for most."""

    def anywhere() -> int:
        return 10**9 + random.randrange(size)

    def request() -> None:
        found = views.request(db, anywhere())
        views.choices(db, found.id)

    def counted() -> None:
        with db.read() as rows:
            rows.execute(text(_COUNTED), {"job": job_id}).one()

    return {
        "job_status": lambda: views.job_status(db, job_id),
        "version": lambda: views.version(db, job_id),
        "standing": lambda: views.standing(db, job_id),
        "jobs_page": lambda: views.jobs_page(db),
        "jobs_page, state running": lambda: views.jobs_page(db, states=("running",)),
        "requests, a page": lambda: views.requests(db, job_id, after=anywhere()),
        "requests, failed": lambda: views.requests(
            db, job_id, states=("failed",), after=anywhere()
        ),
        "requests, failed or queued": lambda: views.requests(
            db, job_id, states=("failed", "queued"), after=anywhere()
        ),
        "requests, finish_reason": lambda: views.requests(
            db, job_id, finish_reasons=("length",), after=anywhere()
        ),
        "requests, of a point": lambda: views.requests(db, job_id, points=(3,), after=anywhere()),
        "one request with chunks": request,
        "errors": lambda: views.errors(db, job_id),
        "events": lambda: views.events(db, job_id),
        "points_page": lambda: views.points_page(db, job_id),
        "a full count (peer)": counted,
    }


def make(db: Database, size: int, small: int) -> str:
    """A job of so many requests, and so many small jobs; the large one's id."""
    job_id = store.insert_job(db, _plan("large", POINTS))
    words = {
        "job": job_id,
        "p": POINTS,
        "now": "clock_timestamp()"
        if db.dialect == "postgresql"
        else "strftime('%Y-%m-%d %H:%M:%f', 'now')",
        "blob": "decode(repeat('07000000', 16), 'hex')"
        if db.dialect == "postgresql"
        else f"x'{'07000000' * 16}'",
        "starts": " UNION ALL ".join(f"SELECT {k} AS s" for k in range(CHUNKS)),
    }
    for a in range(0, size, LOT):
        for statement in _FILL:
            with db.write() as tx:
                lot = _LOT.format(a=a, b=min(a + LOT, size))
                tx.exec_driver_sql((lot + statement.format(**words)).replace("%", _percent(db)))
    with db.write() as tx:
        job = "UPDATE jobs SET n_requests = :n, n_choices = :n, n_items = :n / :p WHERE id = :job"
        tx.execute(text(job), {"n": size, "p": POINTS, "job": job_id})
    for number in range(small):
        store.insert_job(db, _plan(f"small-{number}", 1))
    with db.write() as tx:
        tx.exec_driver_sql("ANALYZE")
    tallies.fold(db)
    return job_id


def _percent(db: Database) -> str:
    return "%%" if db.dialect == "postgresql" else "%"


def _plan(name: str, points: int) -> Plan:
    source = JOB.format(name=name, seeds=list(range(points)))
    return plan(parse_job(source, file="bench.yaml", root=ROOT))


def over_http(url: str, job_id: str, seconds: float) -> None:
    """A server of its own process, asked by clients that keep their connections."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=(url, there), daemon=True)
    server.start()
    address = here.recv()
    for name, path, clients in (
        ("GET /api/jobs/ID", f"/api/jobs/{job_id}", 1),
        (f"GET /api/jobs/ID, {CLIENTS} clients", f"/api/jobs/{job_id}", CLIENTS),
        ("the page of the job", f"/jobs/{job_id}", 1),
        ("the page of a small one", "/jobs/small-0", 1),
        ("its grid, told again or counted", f"/jobs/{job_id}/grid", 1),
        ("the grid of a small one", "/jobs/small-0/grid", 1),
    ):
        taken = ask(address, path, clients, seconds)
        show(name, taken, f"{len(taken) / seconds:10,.0f} requests/s")
    here.send("over")
    server.join()


def ask(address: tuple[str, int], path: str, clients: int, seconds: float) -> list[float]:
    """Seconds of each answer, of so many clients that ask again and again."""
    taken: list[float] = []
    until = time.monotonic() + seconds

    def one_client() -> None:
        with closing(HTTPConnection(*address)) as client:
            while time.monotonic() < until:
                began = time.monotonic()
                client.request("GET", path)
                answer = client.getresponse()
                answer.read()
                assert answer.status == 200, (path, answer.status)
                taken.append(time.monotonic() - began)

    threads = [threading.Thread(target=one_client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def _serve(url: str, pipe: Any) -> None:
    from orchestrator.api.app import create_app
    from orchestrator.api.server import ApiServer, listen

    settings = Settings(database_url=url, broker_url="memory://")
    with Database.open(url) as db, closing(Queue(settings)) as queue:
        listening = listen("127.0.0.1", 0)
        app = create_app(settings, db, queue, keys_needed=False)
        with ApiServer(app, listening):
            pipe.send(listening.getsockname()[:2])
            pipe.recv()


def _seconds(read: Callable[[], object]) -> float:
    began = time.perf_counter()
    read()
    return time.perf_counter() - began


def show(name: str, taken: list[float], more: str = "") -> None:
    """The median and the 99th percentile."""
    taken.sort()
    p99 = taken[min(len(taken) - 1, int(len(taken) * 0.99))]
    print(f"{name:32}{statistics.median(taken) * 1e3:9.2f} ms{p99 * 1e3:9.2f} ms{more}", flush=True)


if __name__ == "__main__":
    main()
