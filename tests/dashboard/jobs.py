"""Jobs for the pages' tests: a graded sweep with log-probs, texts that would harm if they were read
as markup, a story."""

from __future__ import annotations

import json
import time
from pathlib import Path

from orchestrator import lifecycle
from orchestrator.db import views
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.api.conftest import Api

SWEEP = """
name: {name}
model: tiny
dataset:
  items:
    - {{a: 12, b: 34, sum: 46}}
    - {{a: 5, b: 6, sum: 11}}
params:
  messages:
    - {{role: system, content: "You add numbers."}}
    - {{role: user, content: "What is {{{{ a }}}} + {{{{ b }}}}?"}}
  max_tokens: 16
  n: 2
  logprobs: true
  top_logprobs: 5
sweep:
  temperature: [0, 1, 1.5, 2]
  seed: [1, 2, 3]
graders:
  - {{name: correct, type: equals, expected: "{{{{ a }}}} + {{{{ b }}}} = {{{{ sum }}}}"}}
"""
CANARY = "<img src=x onerror=\"alert('canary')\"><script>alert('canary')</script>'\"&lt;"
UNSEEN = "abc\u202edef\u200bghi\x07jkl"
HARM = {
    "name": "harm",
    "model": "tiny",
    "dataset": {"items": [{"custom_id": CANARY + UNSEEN, "text": CANARY + UNSEEN}]},
    "params": {
        "messages": [
            {"role": "system", "content": CANARY},
            {"role": "user", "name": "n", "content": "{{ text }}"},
        ],
        "max_tokens": 40,
        "logprobs": True,
        "top_logprobs": 2,
        "user": CANARY,
    },
    "sweep": {"temperature": [0, 2], "stop": [CANARY, "x"]},
}
STORY = """
name: story
model: tiny
seed: 5
dataset: {items: [{hero: otter}]}
params:
  messages: [{role: user, content: "Tell me a story about a {{ hero }}."}]
  max_tokens: 120
  n: 3
  temperature: 1.1
"""


def submitted(api: Api, yaml: str) -> str:
    """The id of the job, planned and queued."""
    return lifecycle.submit(
        api.db, plan(parse_job(yaml, file="job.yaml", root=Path.cwd())), api.queue
    )


def as_yaml(job: object) -> str:
    """JSON is YAML."""
    return json.dumps(job)


def ended(api: Api, job_id: str) -> views.JobStatus:
    """Where the job stands once everything has ended and is graded."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        status = views.job_status(api.db, job_id)
        if status.finished_at is not None:
            lifecycle.grade(api.db, job_id)
            return status
        time.sleep(0.05)
    raise AssertionError(f"job {job_id} has not ended: {views.job_status(api.db, job_id)}")
