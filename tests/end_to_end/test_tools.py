"""Structured output and calls on `tiny` through real YAML jobs: what ends by itself is as asked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.end_to_end.inside import penstock

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-zé]{1,11}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "🙂"]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        }
    },
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[A-Za-z ]{1,12}$"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "record", "parameters": RECORD, "strict": True}},
    {"type": "function", "function": {"name": "nothing"}},
]
PARAMETERS = {"get_weather": CITY, "record": RECORD, "nothing": {"type": "object"}}
NAMED = {"type": "function", "function": {"name": "record"}}
ASKS = ["What is the weather in Oslo and Lima?", "Extract as JSON: Kelda is 34.", "Tell me a joke."]
SEEDS = list(range(1, 41))
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("tools")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("PENSTOCK_THREADS", "1")
        patch.setenv("PENSTOCK_SLOTS", "16")
        patch.delenv("PENSTOCK_DATABASE_URL", raising=False)
        yield path


def run(folder: Path, name: str, params: dict[str, Any], sweep: dict[str, Any]) -> Lines:
    """The exported lines of a job over ASKS."""
    job = {
        "name": name,
        "model": "tiny",
        "dataset": {"items": [{"ask": ask} for ask in ASKS]},
        "params": {
            "messages": [{"role": "user", "content": "{{ ask }}"}],
            "temperature": 1.5,
            "max_tokens": 150,
            **params,
        },
        **({"sweep": sweep} if sweep else {}),
    }
    (folder / f"{name}.yaml").write_text(json.dumps(job, ensure_ascii=False))
    ended = penstock("run", f"{name}.yaml")
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in penstock("export", name).out.splitlines()]


def choices(lines: Lines) -> list[dict[str, Any]]:
    return [choice for line in lines for choice in line["completion"]["choices"]]


def checked_calls(choice: dict[str, Any]) -> list[str]:
    """The names of the calls of a choice that was not cut off; all of them match their schemas."""
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), PARAMETERS[call["name"]])
    return [call["name"] for call in calls]


def test_a_hot_model_keeps_to_its_schema(folder: Path) -> None:
    wanted = {"name": "record", "schema": RECORD, "strict": True}
    given = {"response_format": {"type": "json_schema", "json_schema": wanted}}
    found = choices(run(folder, "records", given | {"n": 2}, {"seed": SEEDS}))
    ended = [c for c in found if c["finish_reason"] == "stop"]
    for choice in ended:
        jsonschema.validate(json.loads(choice["message"]["content"]), RECORD)
    assert {c["finish_reason"] for c in found} <= {"stop", "length"}
    assert len(found) == 240 and len(ended) > 200
    assert len({c["message"]["content"] for c in ended}) > 100


@pytest.fixture(scope="module")
def called(folder: Path) -> Lines:
    choices = ["auto", "none", "required", NAMED]
    sweep = {"tool_choice": choices, "parallel_tool_calls": [True, False], "seed": SEEDS[:10]}
    return run(folder, "called", {"tools": TOOLS}, sweep)


def of(lines: Lines, choice: object, **more: object) -> list[dict[str, Any]]:
    wanted = {"tool_choice": choice, **more}
    return choices([line for line in lines if wanted.items() <= line["point"].items()])


def test_required_calls_name_a_tool_and_match_its_schema(called: Lines) -> None:
    found = of(called, "required")
    ended = [c for c in found if c["finish_reason"] != "length"]
    assert len(found) == 60 and len(ended) > 30
    for choice in ended:
        assert checked_calls(choice) and choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"
    for choice in of(called, "required", parallel_tool_calls=False):
        assert len(choice["message"].get("tool_calls", ())) <= 1
    assert max(len(checked_calls(c)) for c in ended) > 1


def test_a_named_call_is_the_one_and_ends_with_stop(called: Lines) -> None:
    ended = [c for c in of(called, NAMED) if c["finish_reason"] != "length"]
    assert len(ended) > 50
    for choice in ended:
        assert checked_calls(choice) == ["record"] and choice["finish_reason"] == "stop"


def test_auto_calls_where_the_model_wants_to(called: Lines) -> None:
    found = of(called, "auto")
    with_calls = [c for c in found if c["finish_reason"] == "tool_calls"]
    without = [c for c in found if c["finish_reason"] == "stop"]
    assert with_calls and without
    assert all(checked_calls(choice) for choice in with_calls)
    assert not any("tool_calls" in choice["message"] for choice in without)
    assert not any("<tool_call>" in (choice["message"]["content"] or "") for choice in found)


def test_none_is_text_as_if_there_were_no_tools(folder: Path, called: Lines) -> None:
    plain = choices(run(folder, "plain", {}, {"seed": SEEDS[:10]}))
    texts = [choice["message"]["content"] for choice in plain]
    none = of(called, "none", parallel_tool_calls=True)
    assert [choice["message"]["content"] for choice in none] == texts
    assert all(choice["finish_reason"] in ("stop", "length") for choice in none)


def test_functions_are_called_once(folder: Path) -> None:
    functions = [tool["function"] for tool in TOOLS[:1]]
    sweep = {"function_call": ["auto", "none", {"name": "get_weather"}], "seed": SEEDS[:10]}
    lines = run(folder, "functions", {"functions": functions}, sweep)
    reasons = {"auto": {"function_call", "stop"}, "none": {"stop"}, "named": {"stop"}}
    for line in lines:
        (choice,) = line["completion"]["choices"]
        asked = line["point"]["function_call"]
        kind = asked if isinstance(asked, str) else "named"
        message = choice["message"]
        assert "tool_calls" not in message
        if choice["finish_reason"] == "length":
            continue
        assert choice["finish_reason"] in reasons[kind]
        called = "function_call" in message
        assert called == (kind == "named" or choice["finish_reason"] == "function_call")
        if called:
            assert message["function_call"]["name"] == "get_weather"
            jsonschema.validate(json.loads(message["function_call"]["arguments"]), CITY)


def test_a_schema_that_cannot_be_kept_to_is_said_or_refused(folder: Path) -> None:
    hard = {**CITY, "properties": {"city": {"type": "string", "pattern": "(?=x)"}}}
    function = {"name": "f", "parameters": hard | {"additionalProperties": False}}
    lines = run(folder, "warned", {"tools": [{"type": "function", "function": function}]}, {})
    for line in lines:
        (warning,) = line["completion"]["warnings"]
        assert warning.startswith("tools[0].function.parameters: ")
    job = json.loads((folder / "warned.yaml").read_text())
    job["params"]["tools"][0]["function"]["strict"] = True
    (folder / "refused.yaml").write_text(json.dumps(job))
    for command in ("run", "submit"):
        ended = penstock(command, "refused.yaml")
        assert ended.code == 2
        place = "refused.yaml:1: params.tools[0].function.parameters"
        assert f"{place}: expected a schema that can be enforced, got " in ended.err
