"""A worker's memory does not grow with what it has done: 20,000 requests on the embedded model.

The short form, without a model, stands in test_prefilling.py.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.settings import Settings
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from workers.engine_thread import EngineThread
from workers.folders.folder import TINY, ModelFolder
from workers.loading.model import LoadedModel
from workers.running.memory import resident_bytes

REQUESTS = 20_000
JOB = """
name: many
model: tiny
dataset: {path: many.jsonl}
params:
  messages: [{role: user, content: "{{ words }}"}]
  max_tokens: 3
"""
SETTINGS = Settings(threads=1, slots=16, prefix_cache_mib=8, poll_seconds=0.05, max_context=256)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_twenty_thousand_requests(sqlite_db: Database, tmp_path: Path) -> None:
    lines = (json.dumps({"words": f"{i % 900} planets " * (1 + i % 12)}) for i in range(REQUESTS))
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    settings = replace(SETTINGS, cache_dir=tmp_path)
    model = LoadedModel.load(ModelFolder.load(TINY), settings)
    job_id = store.insert_job(sqlite_db, plan(parse_job(JOB, file="many.yaml", root=tmp_path)))
    thread = EngineThread(settings, sqlite_db, model)
    seen: list[tuple[int, int]] = []
    thread.start()
    try:
        while (status := views.job_status(sqlite_db, job_id)).succeeded < REQUESTS:
            assert thread.error is None and status.failed == 0
            if not seen or status.succeeded >= seen[-1][0] + REQUESTS // 20:
                seen.append((status.succeeded, resident_bytes()))
                print(f"{seen[-1][0]} requests, {seen[-1][1] / 2**20:.1f} MiB")
            time.sleep(0.2)
    finally:
        thread.stop()
    print(f"at the end {resident_bytes() / 2**20:.1f} MiB, {thread.state}")
    warm = next(held for done, held in seen if done >= REQUESTS // 4)
    assert resident_bytes() < warm + 16 * 2**20
    assert thread.state.prefix_bytes <= 8 * 2**20
