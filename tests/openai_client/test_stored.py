"""Streams that jobs on `tiny` have stored: OpenAI's own client folds them as `export` does.

Flushes come every few milliseconds here, so that one completion is many chunks.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db.database import Database
from orchestrator.follow import request_chunks
from tests.end_to_end.inside import penstock
from tests.openai_client.clients import PYTHONS, accumulated, plain

Json = dict[str, Any]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTIONS = [{"name": "get_weather", "parameters": PARAMETERS}, {"name": "look-up"}]
NAMED = {"type": "function", "function": {"name": "look-up"}}
OPTIONS = {"stream_options": {"include_usage": True}, "temperature": 1.5, "max_tokens": 60}


def job(name: str, ask: str, params: Json, sweep: Json) -> str:
    """YAML, of which JSON is a part."""
    messages = [{"role": "user", "content": ask}]
    return json.dumps(
        {
            "name": name,
            "model": "tiny",
            "params": {"messages": messages, **OPTIONS, **params},
            "sweep": sweep,
        }
    )


JOBS = {
    "texts": job(
        "texts",
        "Say a json story, in JSON.",
        {"n": 3, "logprobs": True, "top_logprobs": 2, "service_tier": "auto", "stop": ["the", "}"]},
        {"seed": [1, 2], "response_format": [{"type": "text"}, {"type": "json_object"}]},
    ),
    "tools": job(
        "tools",
        "What is the weather in Oslo?",
        {"n": 2, "tools": [{"type": "function", "function": each} for each in FUNCTIONS]},
        {
            "seed": [1, 2, 3],
            "logprobs": [False, True],
            "max_tokens": [12, 90],
            "tool_choice": ["auto", "required", NAMED],
        },
    ),
    "functions": job(
        "functions",
        "What is the weather in Oslo?",
        {"functions": FUNCTIONS},
        {"seed": [1, 2, 3], "function_call": ["none", "auto", {"name": "get_weather"}]},
    ),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Json]], Json]:
    """By request: its chunks, and its completion as `export` writes it."""
    completions: Json = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("stored"))
        patch.setenv("PENSTOCK_FLUSH_SECONDS", "0.005")
        for name, text in JOBS.items():
            Path(f"{name}.yaml").write_text(text)
            ended = penstock("run", f"{name}.yaml")
            assert ended.code == 0, ended.err
            for line in penstock("export", name).out.splitlines():
                result = json.loads(line)
                completions[str(result["request_id"])] = result["completion"]
        with Database.open("sqlite:///penstock.db") as db:
            streams = {id: list(request_chunks(db, int(id))) for id in completions}
        for id in (min(streams), max(streams)):
            told = penstock("tail", id, "--json").out.splitlines()
            assert [json.loads(chunk) for chunk in told] == streams[id]
    return streams, completions


def test_the_jobs_have_made_every_form(stored: tuple[dict[str, list[Json]], Json]) -> None:
    streams, completions = stored
    reasons: Counter[str] = Counter()
    keys: set[str] = set()
    for completion in completions.values():
        for choice in completion["choices"]:
            reasons[choice["finish_reason"]] += 1
            keys |= {key for key, value in choice["message"].items() if value}
            keys |= {"logprobs"} if choice["logprobs"] else set()
    assert set(reasons) == {"stop", "length", "tool_calls", "function_call"}, reasons
    assert {"content", "tool_calls", "function_call", "logprobs"} <= keys
    assert max(map(len, streams.values())) > 10


@pytest.mark.parametrize("version", PYTHONS)
def test_the_client_folds_them_as_export_does(
    stored: tuple[dict[str, list[Json]], Json], version: str
) -> None:
    streams, completions = stored
    theirs = accumulated(version, streams)
    assert {id: plain(each["completion"]) for id, each in theirs.items()} == completions
