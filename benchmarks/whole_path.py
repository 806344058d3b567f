"""What `penstock run` does, timed: from reading the YAML to the COMMIT that ends the last request.

Plan, submit, a nudge through Celery's embedded transport, claims, a worker in this process,
flushes, the status polled; without graders and without drawing progress. The worker is up and waits
when the clock starts.
"""

import json
import random
import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from loads import Size
from ours import BIAS, Ours, engine_calls
from peer_side import Work
from sqlalchemy import text
from stopwatch import Stopwatch, busy_cpu_seconds, own_cpu_seconds
from turns import Turn, others_share

import workers.engine_thread
from orchestrator import lifecycle
from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.follow import follow_job
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.job import read_job
from orchestrator.spec.plan import plan
from workers.process import LocalWorker, local_worker
from workers.recorder import Recorder

GREEDY: Mapping[str, object] = {"temperature": 0}
EVERYTHING: Mapping[str, object] = {
    "temperature": 1,
    "top_p": 0.95,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logprobs": True,
    "top_logprobs": 5,
}


@dataclass(frozen=True, slots=True)
class Texts:
    """The words that render to a prompt, by prompt: the YAML asks in words."""

    words: dict[tuple[int, ...], str] = field(default_factory=dict)

    def work(self, ours: Ours, size: Size, rows: int, seed: int) -> Work:
        """Random words whose rendered prompts have exactly `size.length` tokens each."""
        source = random.Random(seed)
        prompts = []
        for _ in range(size.prompts):
            words = _words(ours, size.length, source)
            prompts.append(_encode(ours, words))
            self.words[tuple(prompts[-1])] = words
        return Work(prompts, [size.new] * size.prompts, rows, list(ours.ids.forbidden))


def _words(ours: Ours, length: int, source: random.Random) -> str:
    for _ in range(200):
        words: list[str] = []
        for _ in range(4 * length):
            letters = source.choices(string.ascii_lowercase, k=source.randint(1, 8))
            words.append("".join(letters))
            found = len(_encode(ours, " ".join(words)))
            if found == length:
                return " ".join(words)
            if found > length:
                words.pop()
    raise SystemExit(f"no text makes a prompt of {length} tokens: try another --length")


def _encode(ours: Ours, words: str) -> list[int]:
    model = ours.model
    return model.tokenizer.encode(model.template.render([{"role": "user", "content": words}]))


@dataclass
class WholePath:
    """A system: each turn has a job file and a new database of its own."""

    ours: Ours
    texts: Texts
    settings: Settings
    queue: Queue
    folder: Path
    params: Mapping[str, object]
    new_url: Callable[[], str]

    def __call__(self, work: Work) -> Turn:
        job, watch = self.folder / "bench.yaml", Stopwatch()
        self._write(job, work)
        settings = replace(self.settings, database_url=self.new_url(), slots=work.rows)

        def submitted(db: Database, worker: LocalWorker) -> float:
            began = time.perf_counter()
            job_id = lifecycle.submit(db, plan(read_job(job)), self.queue)
            watch.note("plan, submit", began)
            status = follow_job(db, job_id, lambda _: None, lambda: _check(worker))
            if status.state != "succeeded":
                raise SystemExit(f"the job has {status.state}: {status}")
            return watch.ended["flush"] - began

        # One worker after another in this process: without it, nudges reach the first one's engine.
        self.queue.app.set_default()
        with Database.open(settings.database_url) as db:
            calls = (*engine_calls(self.ours.model), *_path_calls())
            with local_worker(settings, db, self.queue, self.ours.model) as worker:
                busy, own, began = busy_cpu_seconds(), own_cpu_seconds(), time.perf_counter()
                with watch.watch(*calls):
                    seconds = submitted(db, worker)
                elapsed = time.perf_counter() - began
                others = others_share(busy, own_cpu_seconds() - own, elapsed)
            found = _persisted(db, len(work.prompts))
        return Turn(seconds, found, others, watch=watch)

    def _write(self, job: Path, work: Work) -> None:
        """JSON is YAML too."""
        items = [json.dumps({"words": self.texts.words[tuple(each)]}) for each in work.prompts]
        job.with_suffix(".jsonl").write_text("\n".join(items) + "\n")
        params = {
            "messages": [{"role": "user", "content": "{{ words }}"}],
            "max_tokens": work.limits[0],
            "logit_bias": {str(id): BIAS for id in work.forbidden},
            **self.params,
        }
        asked = {
            "name": "bench",
            "model": self.ours.model.folder.name,
            "dataset": {"path": job.with_suffix(".jsonl").name},
            "params": params,
        }
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


def _path_calls() -> Sequence[tuple[str, Any, str]]:
    return (
        ("claim", store, "claim"),
        ("admit", workers.engine_thread, "to_completion"),
        ("record", Recorder, "record"),
        ("flush", store, "flush"),
    )


def shares(turn: Turn) -> dict[str, float]:
    """Seconds by part; they add up to the turn's. `rest` is what no watched call covers."""
    spent = turn.watch.seconds
    inside = {name: spent.get(name, 0.0) for name in ("prefill", "decode", "copy", "sample")}
    parts = inside | {"engine's own": spent.get("step", 0.0) - sum(inside.values())}
    outside = ("plan, submit", "claim", "admit", "record", "flush")
    parts |= {name: spent[name] for name in outside if name in spent}
    return parts | {"rest": turn.seconds - sum(parts.values())}
