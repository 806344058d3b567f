"""The OpenAPI document against the real server: schemathesis asks, every answer is as documented.

200 examples an operation, and the edges of every parameter, which are some 100 more; the long form,
marked `soak`, asks for 1,000. OPENAPI_EXAMPLES=N for another number. A seed is printed;
OPENAPI_SEED=N repeats it.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, assume, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from orchestrator.api.app import create_app
from orchestrator.db.database import Database
from orchestrator.settings import Settings
from tests.api.chatting import tiny, until
from tests.api.conftest import api_at, settings_in
from tests.orchestrator.db.builders import rows
from workers.process import local_worker

SEED = int(os.environ.get("OPENAPI_SEED", random.SystemRandom().randrange(2**31)))
EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", 200))
LONG = 1000

# What a document cannot say of a body (a template that fails, a schema that cannot be met) is
# refused with 400; what is somebody else's or over is 404 or 409.
_FINE = ["2xx", "304", "400", "404", "409", "413"]
CONFIG = SchemathesisConfig.from_dict(
    {
        "seed": SEED,
        "checks": {"positive_data_acceptance": {"expected-statuses": _FINE}},
        "generation": {"database": "none"},
    }
)


def document() -> dict[str, Any]:
    """The routes are known before there is a database."""
    nothing: Any = None
    return create_app(Settings(), nothing, nothing, keys_needed=False).openapi()


SCHEMA = schemathesis.openapi.from_dict(document(), config=CONFIG)


@dataclass(frozen=True)
class Service:
    """What runs, what ids there are by the names of path parameters, and one connection."""

    url: str
    ids: dict[str, str]
    session: requests.Session


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("openapi")
    given = replace(settings_in(folder), max_choices=4)
    with (
        Database.open(given.database_url) as db,
        api_at(db, given) as api,
        local_worker(given, db, api.queue, tiny()),
        requests.Session() as session,
    ):
        yield Service(api.url, things(api.url, db), session)


def things(url: str, db: Database) -> dict[str, str]:
    """One of everything that a path can name."""
    job = {
        "name": "sums",
        "model": "tiny",
        "dataset": {"items": [{"a": 1}, {"a": 2}]},
        "params": {"messages": [{"role": "user", "content": "{{ a }}"}], "max_tokens": 4},
        "sweep": {"temperature": [0, 1]},
    }
    chat = {**job["params"], "model": "tiny"}
    line = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"tiny",'
    line += b'"messages":[{"role":"user","content":"1"}],"max_tokens":2}}\n'
    with httpx.Client(base_url=url, timeout=60) as client:
        job_id = client.post("/api/jobs", json=job).json()["id"]
        completion = client.post("/v1/chat/completions", json=chat).json()["id"]
        upload = {"file": ("a.jsonl", line)}
        file = client.post("/v1/files", files=upload, data={"purpose": "batch"}).json()["id"]
        body = {
            "input_file_id": file,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        batch = client.post("/v1/batches", json=body).json()["id"]
        until(lambda: client.get(f"/api/jobs/{job_id}").json()["state"] == "succeeded")
    ((request,), *_) = rows(db, f"SELECT id FROM requests WHERE job_id = '{job_id}' ORDER BY id")
    ids = {"job": job_id, "request": str(request), "completion": completion}
    ids |= {"file": file, "batch": batch, "model": "tiny"}
    return ids | {f"{name}_id": id for name, id in ids.items()} | {"given": job_id}


def real(case: Any, ids: dict[str, str]) -> None:
    """Two of three valid cases ask for what there is; those that would wait long do not."""
    if case.meta is not None and case.meta.generation.mode != GenerationMode.POSITIVE:
        return
    for name, given in list(case.path_parameters.items()):
        if name in ids and zlib.crc32(repr(given).encode()) % 3:
            case.path_parameters[name] = ids[name]
    if case.query and isinstance(case.query.get("wait"), int | float):
        case.query["wait"] = min(case.query["wait"], 0)
    if case.path == "/v1/chat/completions" and isinstance(case.body, dict):
        case.body["model"] = "tiny"
        case.body["max_tokens"] = 1 + zlib.crc32(repr(case.body).encode()) % 8
        case.body.pop("max_completion_tokens", None)


def unwritten(case: Any) -> bool:
    """An empty list is no part of a form: what would be wrong with the body is never sent."""
    form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
    return form and any(value == [] for value in case.body.values())


def ask(case: Any, service: Service) -> None:
    assume(not unwritten(case))
    real(case, service.ids)
    case.call_and_validate(base_url=service.url, session=service.session, timeout=60)


@SCHEMA.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_documented(case: Any, service: Service) -> None:
    print("seed", SEED)
    ask(case, service)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@SCHEMA.parametrize()
@settings(max_examples=LONG, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_documented_at_length(case: Any, service: Service) -> None:
    print("seed", SEED)
    ask(case, service)
