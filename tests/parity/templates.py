"""What `transformers` makes of the chat templates in tests/templates: the recorded expectation.

Every template, with every conversation, with and without tools, through `apply_chat_template`, at
one moment that `strftime_now` tells. Conversations are in the API's form: arguments are parsed
and text parts joined first, as docs/chat-completions-streaming.md sections 1.2 and 6 say.

Runs in the environment of `requirements.txt` beside this file; knows nothing of Penstock.
`tests/templates/test_templates.py` compares.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

TEMPLATES = Path(__file__).parents[1] / "templates"
NOON = datetime(2024, 8, 6, 12)


class Noon(datetime):
    """The clock that templates see."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return NOON


def read(name: str) -> Any:
    return json.loads((TEMPLATES / name).read_text(encoding="utf-8"))


def tokenizer(name: str, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """One without a vocabulary to speak of: only its template and special tokens matter."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")), **special_tokens
    )
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tool_use = TEMPLATES / f"{name}.tool_use.jinja"
    made.chat_template = (
        {"default": source, "tool_use": tool_use.read_text(encoding="utf-8")}
        if tool_use.exists()
        else source
    )
    return made


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """The message as `transformers` wants it."""
    message = dict(message)
    if isinstance(message["content"], list):
        message["content"] = "".join(part["text"] for part in message["content"])
    if "tool_calls" in message:
        message["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json.loads(call["function"]["arguments"] or "{}"),
                },
            }
            for call in message["tool_calls"]
        ]
    return message


def applied(made: PreTrainedTokenizerFast, messages: list[Any], **given: Any) -> dict[str, str]:
    """The text, or what the template says against it; no words for any other failure."""
    try:
        text = made.apply_chat_template(list(map(plain, messages)), tokenize=False, **given)
    except jinja2.TemplateError as error:
        said = str(error) if type(error) is jinja2.TemplateError else ""
        return {"error": said}
    except Exception:
        return {"error": ""}
    assert isinstance(text, str)
    return {"text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TEMPLATES / "expected.json")
    output = parser.parse_args().output
    chat_template_utils.datetime = Noon
    given = read("conversations.json")
    expected: dict[str, dict[str, dict[str, str]]] = {}
    for name, special_tokens in read("templates.json").items():
        made = tokenizer(name, special_tokens)
        expected[name] = cases = {}
        for title, messages in given["conversations"].items():
            for tools in (None, given["tools"]):
                case = f"{title}, tools" if tools else title
                cases[case] = applied(made, messages, tools=tools, add_generation_prompt=True)
            cases[f"{title}, no prompt"] = applied(made, messages, add_generation_prompt=False)
    written = {"transformers": transformers.__version__, "expected": expected}
    output.write_text(json.dumps(written, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    print(f"{sum(map(len, expected.values()))} renderings -> {output}")


if __name__ == "__main__":
    main()
