"""Messages to the prompt's text by the model's own chat template, and the tokens that end a turn.

Finds the template in the model's folder, as docs/chat-completions-streaming.md section 8 says;
`workers.words.conversation` puts messages and tools into the form that templates know, and
`workers.words.rendering` runs the template, which is not trusted, in a process with limits. Knows
nothing of jobs, sampling or devices.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import RequestError, WorkerError
from workers.words.conversation import to_messages, to_tools
from workers.words.rendering import Renderer, RenderError
from workers.words.sandbox import LIMITS, Limits
from workers.words.tokenizer import Tokenizer

# Mistral's templates: "Tool call IDs should be alphanumeric strings with length 9!"
_WANTS_SHORT_IDS = re.compile(r"id['\"\])]*\s*\|\s*length\s*[!=]=\s*9\b")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's chat template; `tool_source` is used instead when tools are given.

    Threads may share one. Its process ends with `close`, and with the last use of the template.
    """

    source: str
    tool_source: str | None
    _renderer: Renderer
    _special_tokens: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path, limits: Limits = LIMITS) -> "ChatTemplate":
        """Read the template of a model's folder, and compile it.

        `chat_template.jinja` (with `additional_chat_templates/tool_use.jinja` for requests with
        tools) goes before `chat_template` of `tokenizer_config.json`, which is a text or a list of
        {name, template} (`default`, `tool_use`).
        WorkerError `model` if there is none or it does not compile.
        """
        config = _read_json(folder / "tokenizer_config.json")
        source, tool_source = _sources(folder, config)
        try:
            renderer = Renderer([source] if tool_source is None else [source, tool_source], limits)
        except RenderError as error:
            reason = f"{folder}: the chat template is not valid: {error}"
            raise WorkerError("model", reason) from error
        special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
        return cls(source, tool_source, renderer, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        now: datetime | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for `messages`, the template's own BOS included.

        `tools` may be `functions` too. `now` is what `strftime_now` tells the template: give the
        request's own time, so that the prompt is the same whenever it is rendered (without it:
        the current time, UTC). Raises RequestError: `template_error` when the template refuses,
        fails or goes beyond its limits, `unsupported_content` for a part that is not text; and
        WorkerError `model` when its process cannot be started.
        """
        tool_source = self.tool_source if tools else None
        short_ids = _WANTS_SHORT_IDS.search(tool_source or self.source) is not None
        values = {
            **self._special_tokens,
            "messages": to_messages(messages, short_ids=short_ids),
            "tools": to_tools(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._renderer.render(
                0 if tool_source is None else 1, values, now or datetime.now(UTC)
            )
        except RenderError as error:
            raise RequestError("template_error", f"chat template: {error}") from error

    def close(self) -> None:
        """End the process that renders; another rendering would start another."""
        self._renderer.close()


def eos_token_ids(
    folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> frozenset[int]:
    """The tokens that end a completion: what the model's files name, and the template's turn end.

    `eos_token_id` of `generation_config.json` (of `config.json` where that one has none) and of
    `genai_config.json`'s `model`, the tokenizer's `eos_token`, and the special token that the chat
    template (if there is one) writes right after an assistant's message. Empty if none of them says
    anything. `template` is the folder's own where it is loaded already.
    """
    config = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    if generation.get("eos_token_id") is None:
        generation = _read_json(folder / "config.json")
    genai = _read_json(folder / "genai_config.json").get("model") or {}
    eos = tokenizer.token_id(str(_special_tokens(config).get("eos_token", "")))
    found = {*_ids(generation.get("eos_token_id")), *_ids(genai.get("eos_token_id")), eos}
    found.add(_turn_end(folder, tokenizer, template))
    return frozenset(id for id in found if id is not None)


def _turn_end(folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> int | None:
    answer = "An answer."
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": answer}]
    try:
        template = template or ChatTemplate.load(folder)
        text = template.render(messages, add_generation_prompt=False)
    except (RequestError, WorkerError):
        return None
    _, found, rest = text.rpartition(answer)
    following = tokenizer.encode(rest.lstrip())[:1] if found else []
    return next((id for id in following if tokenizer.is_special(id)), None)


def _ids(value: object) -> list[int]:
    if isinstance(value, list):
        return [id for id in value if isinstance(id, int)]
    return [value] if isinstance(value, int) else []


def _sources(folder: Path, config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text of the template, and of that for requests with tools if there is another."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        # Where transformers writes the other templates of a list.
        beside = folder / "additional_chat_templates" / "tool_use.jinja"
        return _read_text(path), _read_text(beside) if beside.is_file() else None
    given = config.get("chat_template")
    if isinstance(given, str):
        return given, None
    if isinstance(given, list):
        named = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
        default, tool_use = named.get("default"), named.get("tool_use")
        if isinstance(default, str):
            return default, tool_use if isinstance(tool_use, str) else None
    raise WorkerError(
        "model",
        f"{folder}: no chat template (neither chat_template.jinja nor chat_template in "
        "tokenizer_config.json): the model cannot serve chat",
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WorkerError("model", f"{path}: not UTF-8: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise WorkerError("model", f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WorkerError("model", f"{path}: expected an object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token`, `eos_token`, ... as text; a token may be written as an object."""
    found = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: value for key, value in found.items() if isinstance(value, str)}
