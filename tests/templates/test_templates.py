"""Prompts of the main families' templates, equal to those of `transformers` to the character.

The templates beside this file are written in the style of the public ones; `expected.json` holds
what `apply_chat_template` made of them (tests/parity/templates.py, run by `make parity`, which
compares anew with what is installed then).
"""

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RequestError
from workers.words.chat import ChatTemplate

HERE = Path(__file__).parent
EXPECTED = Path(os.environ.get("PARITY_TEMPLATES") or HERE / "expected.json")
NOON = datetime(2024, 8, 6, 12, tzinfo=UTC)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


NAMES = read(HERE / "templates.json")


def template(name: str, folder: Path) -> ChatTemplate:
    """The template in a model's folder: a list in the configuration if it has one for tools."""
    config = dict(NAMES[name])
    if (HERE / f"{name}.tool_use.jinja").exists():
        files = {"default": f"{name}.jinja", "tool_use": f"{name}.tool_use.jinja"}
        config["chat_template"] = [
            {"name": kind, "template": (HERE / file).read_text(encoding="utf-8")}
            for kind, file in files.items()
        ]
    else:
        shutil.copy(HERE / f"{name}.jinja", folder / "chat_template.jinja")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return ChatTemplate.load(folder)


def test_every_template_here_is_compared() -> None:
    files = {path.name.split(".")[0] for path in HERE.glob("*.jinja")}
    assert files == set(NAMES) == set(read(EXPECTED)["expected"])


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    given, expected = read(HERE / "conversations.json"), read(EXPECTED)["expected"][name]
    loaded, compared = template(name, tmp_path), 0
    for title, messages in given["conversations"].items():
        for more, options in (
            ("", {}),
            (", tools", {"tools": given["tools"]}),
            (", no prompt", {"add_generation_prompt": False}),
        ):
            case = expected[title + more]
            try:
                text = loaded.render(messages, now=NOON, **options)
            except RequestError as error:
                assert "error" in case, (title + more, error.message)
                assert error.message.startswith("chat template: " + case["error"]), title + more
            else:
                assert {"text": text} == case, title + more
                compared += 1
    assert compared >= len(expected) // 3  # a template that refuses everything shows nothing
