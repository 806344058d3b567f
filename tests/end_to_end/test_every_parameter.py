"""Each of the 23 parameters in a YAML job on `tiny`, and what it changes in the stored answer.

One job has a point for each parameter that may be swept, beside a plain one; two more have tools
and functions. Everything is read back as `penstock export` writes it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.params import NAMES
from tests.end_to_end.inside import penstock
from workers.words.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "workers" / "models" / "tiny"
STORY = "Tell me a story about a fox."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,15}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
POINTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "again": {"temperature": 0, "seed": 5, "top_p": 0.5},
    "hot": {"temperature": 2, "seed": 1},
    "hot too": {"temperature": 2, "seed": 1, "user": "someone"},
    "other": {"temperature": 2, "seed": 2},
    "top": {"temperature": 2, "top_p": 0, "seed": 2},
    "often": {"temperature": 0, "frequency_penalty": 2},
    "once": {"temperature": 2, "seed": 1, "presence_penalty": -2},
    "biased": {"temperature": 0, "logit_bias": "A"},
    "scored": {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    "three": {"temperature": 2, "n": 3},
    "stopped": {"temperature": 0, "stop": ["never", " fox"]},
    "cut": {"temperature": 0, "max_tokens": 2},
    "tier": {"temperature": 0, "service_tier": "auto"},
    "schema": {
        "temperature": 2,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "strict": True, "schema": PERSON},
        },
        "max_tokens": 64,
    },
}
CALLS: dict[str, dict[str, Any]] = {
    "none": {"tool_choice": "none"},
    "auto": {"tool_choice": "auto"},
    "required": {"tool_choice": "required", "temperature": 1.5},
    "named": {"tool_choice": {"type": "function", "function": {"name": "lookup"}}},
    "one": {"parallel_tool_calls": False},
}
OLD_CALLS: dict[str, dict[str, Any]] = {
    "none": {"function_call": "none"},
    "auto": {"function_call": "auto"},
    "named": {"function_call": {"name": "lookup"}},
}
FUNCTIONS = [
    {"name": name, "parameters": {
        "type": "object", "properties": {key: {"type": "string"}}, "required": [key]}}
    for name, key in (("get_weather", "city"), ("lookup", "name"))
]  # fmt: skip
TWO_CITIES = "What is the weather in Oslo and Lima?"
Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("parameters")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("PENSTOCK_THREADS", "1")
        patch.delenv("PENSTOCK_DATABASE_URL", raising=False)
        yield path


def answers(folder: Path, name: str, params: dict[str, Any], points: Answers) -> Answers:
    """The exported completion of each point, by its name; JSON is YAML."""
    job = {"name": name, "params": params, "sweep": {"include": list(points.values())}}
    (folder / f"{name}.yaml").write_text(json.dumps(job))
    ended = penstock("run", f"{name}.yaml")
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in penstock("export", name).out.splitlines()]
    assert [line["point"] for line in lines] == list(points.values())
    return dict(zip(points, lines, strict=True))


@pytest.fixture(scope="module")
def given(folder: Path) -> Answers:
    token = Tokenizer(TINY).encode("A")[0]
    points = POINTS | {"biased": {"temperature": 0, "logit_bias": {str(token): 100}}}
    params = {
        "model": "tiny", "messages": [{"role": "user", "content": STORY}],
        "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 24,
    }  # fmt: skip
    return answers(folder, "given", params, points)


@pytest.fixture(scope="module")
def called(folder: Path) -> Answers:
    params = {
        "model": "tiny", "messages": [{"role": "user", "content": TWO_CITIES}],
        "max_tokens": 90, "temperature": 0,
        "tools": [{"type": "function", "function": each} for each in FUNCTIONS],
    }  # fmt: skip
    swept = {name: {"temperature": 0, **point} for name, point in CALLS.items()}
    return answers(folder, "called", params, swept)


@pytest.fixture(scope="module")
def called_as_once(folder: Path) -> Answers:
    params = {
        "model": "tiny", "messages": [{"role": "user", "content": TWO_CITIES}],
        "max_tokens": 90, "temperature": 0, "functions": FUNCTIONS,
    }  # fmt: skip
    return answers(folder, "called_as_once", params, OLD_CALLS)


def choice(line: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found = line["completion"]["choices"][index]
    assert found["index"] == index
    return dict(found)


def text(line: dict[str, Any], index: int = 0) -> str:
    return str(choice(line, index)["message"]["content"])


def test_none_is_forgotten() -> None:
    base = {"model", "messages", "stream", "stream_options", "tools", "functions"}
    varied = {key for points in (POINTS, CALLS, OLD_CALLS) for p in points.values() for key in p}
    assert base | varied == set(NAMES)


def test_messages_and_model(given: Answers) -> None:
    assert text(given["greedy"]).startswith("Once there was a brave fox")
    assert {line["completion"]["model"] for line in given.values()} == {"tiny"}


def test_stream_and_stream_options(given: Answers) -> None:
    line = given["scored"]
    told = penstock("tail", str(line["request_id"]), "--json").out.splitlines()
    chunks = [json.loads(each) for each in told]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == line["completion"]["usage"]


def test_temperature_and_seed(given: Answers) -> None:
    assert text(given["again"]) == text(given["greedy"])
    assert text(given["hot"]) == text(given["hot too"]) != text(given["other"])
    assert [given[name]["seed"] for name in ("again", "hot", "other")] == [5, 1, 2]
    assert given["greedy"]["seed"] >= 0  # drawn, and told


def test_top_p(given: Answers) -> None:
    assert text(given["top"]) == text(given["greedy"])


def test_frequency_penalty_and_presence_penalty(given: Answers) -> None:
    """Neither is alone in its text: what is compared differs in the penalty only."""
    assert text(given["often"]) != text(given["greedy"])
    assert text(given["once"]) != text(given["hot"])


def test_logit_bias(given: Answers) -> None:
    assert text(given["biased"]) == "A" * 24


def test_logprobs_and_top_logprobs(given: Answers) -> None:
    assert choice(given["greedy"])["logprobs"] is None
    entries = choice(given["scored"])["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in entries).decode() == text(given["scored"])
    for entry in entries:
        ranked = [each["logprob"] for each in entry["top_logprobs"]]
        assert len(ranked) == 3
        assert ranked == sorted(ranked, reverse=True)
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy


def test_n(given: Answers) -> None:
    texts = [text(given["three"], index) for index in range(3)]
    assert len(given["three"]["completion"]["choices"]) == 3
    assert len(set(texts)) > 1
    plain, three = (given[name]["completion"]["usage"] for name in ("greedy", "three"))
    assert three["prompt_tokens"] == plain["prompt_tokens"]
    assert three["completion_tokens"] > plain["completion_tokens"]


def test_stop(given: Answers) -> None:
    assert text(given["stopped"]) == "Once there was a brave"
    assert choice(given["stopped"])["finish_reason"] == "stop"


def test_max_tokens(given: Answers) -> None:
    assert choice(given["cut"])["finish_reason"] == "length"
    assert given["cut"]["completion"]["usage"]["completion_tokens"] == 2
    assert text(given["greedy"]).startswith(text(given["cut"]))


def test_service_tier(given: Answers) -> None:
    assert given["tier"]["completion"]["service_tier"] == "default"
    assert "service_tier" not in given["greedy"]["completion"]


def test_user(given: Answers) -> None:
    assert [given[name]["user"] for name in ("hot", "hot too")] == [None, "someone"]
    found = penstock("export", "given", "--user", "someone").out.splitlines()
    assert [json.loads(line)["request_id"] for line in found] == [given["hot too"]["request_id"]]


def test_response_format(given: Answers) -> None:
    """At the highest temperature; the schema bounds every value, so the text comes to its end."""
    assert choice(given["schema"])["finish_reason"] == "stop"
    value = json.loads(text(given["schema"]))
    assert list(value) == ["name", "age"]
    assert re.fullmatch(PERSON["properties"]["name"]["pattern"], value["name"])
    assert 0 <= value["age"] <= 150


def test_response_format_of_any_object(folder: Path) -> None:
    ask = "Extract as JSON with keys name, age: Kelda is 34 years old and lives in Lisbon."
    params = {"model": "tiny", "messages": [{"role": "user", "content": ask}], "max_tokens": 40}
    points = {
        "wanted": {"temperature": 0, "response_format": {"type": "json_object"}},
        "stopped": {"temperature": 0, "response_format": {"type": "json_object"}, "stop": "Kelda"},
    }
    told = answers(folder, "any_object", params, points)
    assert json.loads(text(told["wanted"])) == {"name": "Kelda", "age": 34}
    assert text(told["stopped"]) == '{"name": "'
    assert choice(told["stopped"])["finish_reason"] == "stop"


def arguments(line: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = choice(line)["message"].get("tool_calls", [])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_tools_and_tool_choice(called: Answers) -> None:
    cities = [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Lima"})]
    assert arguments(called["auto"]) == cities
    assert choice(called["auto"])["finish_reason"] == "tool_calls"
    assert choice(called["auto"])["message"]["content"] is None
    assert arguments(called["none"]) == []
    assert choice(called["none"])["finish_reason"] == "stop"
    assert called["none"]["usage"]["prompt_tokens"] < called["auto"]["usage"]["prompt_tokens"]
    assert arguments(called["required"])
    assert choice(called["required"])["finish_reason"] == "tool_calls"
    ((name, given),) = arguments(called["named"])
    assert (name, list(given)) == ("lookup", ["name"])
    assert choice(called["named"])["finish_reason"] == "stop"


def test_parallel_tool_calls(called: Answers) -> None:
    assert arguments(called["one"]) == arguments(called["auto"])[:1]
    assert choice(called["one"])["finish_reason"] == "tool_calls"


def test_functions_and_function_call(called_as_once: Answers) -> None:
    told = {name: choice(line) for name, line in called_as_once.items()}
    call = told["auto"]["message"]["function_call"]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Oslo"})
    assert told["auto"]["finish_reason"] == "function_call"
    assert told["named"]["message"]["function_call"]["name"] == "lookup"
    assert told["named"]["finish_reason"] == "stop"
    assert "function_call" not in told["none"]["message"]
    assert "tool_calls" not in told["auto"]["message"]
