"""OpenAI's Node package against the whole service, where `npm install` was run in `tests/node`."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.chatting import ASK, same, serving, tiny

Json = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "node"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ASKED: Json = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 24, "seed": 1}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
TEXT = "31 + 44 = 75"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (FOLDER / "node_modules" / "openai").is_dir(),
    reason="needs node, and `npm install` in tests/node",
)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Json]:
    """What the script has printed."""
    file = tmp_path_factory.mktemp("node") / "penstock.db"
    given = json.dumps({"asked": ASKED, "tools": TOOLS, "schema": CITY})
    with serving(f"sqlite:///{file}", model=tiny()) as service:
        done = subprocess.run(
            ["node", "chat.mjs", service.v1],
            cwd=FOLDER,
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout)


def test_whole_and_streamed_are_the_same(said: Json) -> None:
    assert said["whole"]["choices"][0]["message"]["content"] == TEXT
    assert said["streamed"] == TEXT
    assert said["stored"] == said["whole"]


def test_the_helper_accumulates_every_choice(said: Json) -> None:
    assert [each["message"]["content"] for each in said["final"]["choices"]] == [TEXT, TEXT]
    assert said["events"] > 0
    assert same(said["whole"])["usage"]["prompt_tokens"] == said["final"]["usage"]["prompt_tokens"]


def test_calls_and_shapes(said: Json) -> None:
    call = said["calls"][0]["function"]
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"])["city"] in ("Oslo", "Rome")
    assert said["parsed"]["city"] in ("Oslo", "Rome")


def test_models_and_errors(said: Json) -> None:
    assert said["models"] == ["tiny"]
    assert said["refused"] == {
        "name": "BadRequestError",
        "status": 400,
        "code": "decimal_above_max_value",
        "param": "temperature",
        "type": "invalid_request_error",
    }
    assert said["unknown"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}
