"""The systems that `engine.py` compares, each a function of the same load, and where they spend it.

Knows which calls make up a step of the engine and a turn of the worker, to time them; it changes
none of them. Knows nothing of rounds, ratios or tables.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peers import PeerProcess
from sqlalchemy import text
from stopwatch import Stopwatch, busy_cpu_seconds, own_cpu_seconds

import workers.engine
import workers.engine_thread
from orchestrator import lifecycle
from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.follow import follow_job
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.job import read_job
from orchestrator.spec.plan import plan
from workers.engine import Choice, Completion, Engine, Event, Tokens
from workers.process import LoadedModel, LocalWorker, local_worker
from workers.recorder import Recorder
from workers.sampler import Sampling

PEER = Path(__file__).parent / "genai_peer.py"
BIAS = -100  # as far down as the API lets a token be pushed


@dataclass(frozen=True, slots=True)
class Load:
    """What every system is given; lengths in tokens, the same for all requests."""

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    new_tokens: int
    slots: int

    @property
    def total(self) -> int:
        return len(self.prompts) * self.new_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """One system's turn; `others` is the share of the processors that went to somebody else."""

    seconds: float
    tokens: list[list[int]]
    watch: Stopwatch
    others: float


System = Callable[[Load], Measured]


def bare_engine(model: LoadedModel, load: Load, sampling: Sampling) -> Measured:
    """Every completion admitted at once, then steps until the engine is idle."""
    watch, found = Stopwatch(), [list[int]() for _ in load.prompts]
    engine = Engine(model.runner, model.tokenizer, model.eos)

    def work() -> float:
        began = time.perf_counter()
        for id, prompt in enumerate(load.prompts):
            asked = replace(sampling, seed=id)
            engine.admit(Completion(id, prompt, asked, (Choice(0),), load.new_tokens))
        while not engine.idle:
            _gather(found, engine.step())
        return time.perf_counter() - began

    with watch.watch(*_engine_calls(model)):
        seconds, others = _alone(work)
    return Measured(seconds, found, watch, others)


def _gather(found: list[list[int]], events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, Tokens):
            found[event.id] += event.tokens


def whole_path(
    model: LoadedModel, load: Load, settings: Settings, queue: Queue, job: Path
) -> Measured:
    """`penstock run` on `job` with a new database; from reading the file to the last COMMIT."""
    watch = Stopwatch()
    _write_job(job, model, load)
    for file in job.parent.glob("bench.db*"):
        file.unlink()
    settings = replace(settings, database_url=f"sqlite:///{job.parent / 'bench.db'}")

    def work() -> float:
        began = time.perf_counter()
        job_id = lifecycle.submit(db, plan(read_job(job)), queue)
        watch.note("plan, submit", began)
        status = follow_job(db, job_id, lambda _: None, lambda: _check(worker))
        if status.state != "succeeded":
            raise SystemExit(f"the job has {status.state}: {status}")
        return watch.ended["flush"] - began

    # One worker after another in this process: without it, nudges reach the first one's engine.
    queue.app.set_default()
    with Database.open(settings.database_url) as db:
        calls = (*_engine_calls(model), *_path_calls())
        with local_worker(settings, db, queue, model) as worker, watch.watch(*calls):
            seconds, others = _alone(work)
        found = _persisted(db, len(load.prompts))
    return Measured(seconds, found, watch, others)


def _write_job(job: Path, model: LoadedModel, load: Load) -> None:
    """JSON is YAML too."""
    items = "".join(json.dumps({"words": words}) + "\n" for words in load.texts)
    job.with_suffix(".jsonl").write_text(items)
    params = {
        "messages": [{"role": "user", "content": "{{ words }}"}],
        "max_tokens": load.new_tokens,
        "temperature": 0,
        "logit_bias": {str(id): BIAS for id in sorted(model.eos)},
    }
    dataset = {"path": job.with_suffix(".jsonl").name}
    asked = {"name": "bench", "model": model.folder.name, "dataset": dataset, "params": params}
    job.write_text(json.dumps(asked, indent=2))


def _check(worker: LocalWorker) -> None:
    if worker.error is not None:
        raise worker.error


def _persisted(db: Database, requests: int) -> list[list[int]]:
    every = text("SELECT request_id, token_ids FROM chunks ORDER BY request_id, token_start")
    found: dict[int, list[int]] = {}
    with db.read() as tx:
        for id, token_ids in tx.execute(every):
            found.setdefault(id, []).extend(np.frombuffer(token_ids, "<i4").tolist())
    assert len(found) == requests, f"{len(found)} of {requests} requests have chunks"
    return list(found.values())


class Peer(PeerProcess):
    """onnxruntime-genai in a process of its own, its model loaded once."""

    def __init__(self, python: Path, folder: Path, threads: int) -> None:
        super().__init__(python, PEER, str(folder), "--threads", str(threads))

    def __call__(self, load: Load) -> Measured:
        command = {"prompts": load.prompts, "batch": load.slots, "new_tokens": load.new_tokens}
        busy = busy_cpu_seconds()
        reply = self.ask(command)
        others = _others(busy, float(reply["cpu_seconds"]), float(reply["seconds"]))
        return Measured(float(reply["seconds"]), reply["tokens"], Stopwatch(), others)


# --- where the time goes --------------------------------------------------------------------------


def _engine_calls(model: LoadedModel) -> tuple[tuple[str, Any, str], ...]:
    return (
        ("step", Engine, "step"),
        ("prefill", model.runner, "prefill"),
        ("decode", model.runner, "decode"),
        ("sample", workers.engine, "sample"),
    )


def _path_calls() -> tuple[tuple[str, Any, str], ...]:
    return (
        ("claim", store, "claim"),
        ("admit", workers.engine_thread, "to_completion"),
        ("record", Recorder, "record"),
        ("flush", store, "flush"),
    )


def _alone(work: Callable[[], float]) -> tuple[float, float]:
    """The seconds that `work` reports, and the share of the processors that others took."""
    busy, own = busy_cpu_seconds(), own_cpu_seconds()
    began = time.perf_counter()
    seconds = work()
    elapsed = time.perf_counter() - began
    return seconds, _others(busy, own_cpu_seconds() - own, elapsed)


def _others(busy_before: float | None, own: float, elapsed: float) -> float:
    busy = busy_cpu_seconds()
    if busy is None or busy_before is None:
        return float("nan")
    return max(0.0, busy - busy_before - own) / (elapsed * (os.cpu_count() or 1))


def shares(measured: Measured) -> dict[str, float]:
    """Seconds by part; they add up to the run's. `rest` is what no watched call covers."""
    spent = measured.watch.seconds
    inside = {name: spent.get(name, 0.0) for name in ("prefill", "decode", "sample")}
    parts = inside | {"engine's own": spent.get("step", 0.0) - sum(inside.values())}
    outside = ("plan, submit", "claim", "admit", "record", "flush")
    parts |= {name: spent[name] for name in outside if name in spent}
    return parts | {"rest": measured.seconds - sum(parts.values())}
