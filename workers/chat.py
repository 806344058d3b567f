"""Messages to the prompt's text by the model's own chat template, and the tokens that end a turn.

Knows nothing of jobs, sampling or devices. Templates come with model repositories and are not
trusted: they run in jinja2's sandbox and see plain JSON values only. The environment is that of
docs/chat-completions-streaming.md section 8, which reproduces the transformers library.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.errors import RequestError, WorkerError
from workers.tokenizer import Tokenizer

MAX_PROMPT_CHARACTERS = 16_000_000


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a training run masks: here its body."""

    tags = {"generation"}  # noqa: RUF012 - the attribute is jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's chat template; `tool_source` is used instead when tools are given."""

    source: str
    tool_source: str | None
    _template: jinja2.Template
    _tool_template: jinja2.Template
    _special_tokens: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate":
        """Read the template of a model's folder.

        `chat_template.jinja` goes before `chat_template` of `tokenizer_config.json`, which is a
        text or a list of {name, template} (`default`, and `tool_use` for requests with tools).
        WorkerError `model` if there is none or it does not compile.
        """
        config = _read_json(folder / "tokenizer_config.json")
        source, tool_source = _sources(folder, config)
        template = _compiled(source, folder)
        tool_template = template if tool_source is None else _compiled(tool_source, folder)
        special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
        return cls(source, tool_source, template, tool_template, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        now: datetime | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for `messages`, the template's own BOS included.

        `now` is what `strftime_now` tells the template: give the request's own time, so that the
        prompt is the same whenever it is rendered (without it: the current time, UTC). Raises
        RequestError: `template_error` when the template refuses or fails, `unsupported_content`
        for a part that is not text.
        """
        template = self._tool_template if tools else self._template
        values = {
            **self._special_tokens,
            "messages": [_plain(message, at) for at, message in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime(now or datetime.now(UTC)),
        }
        try:
            return "".join(_bounded(template.generate(values)))
        except RequestError:
            raise
        except Exception as error:  # a template is foreign code: whatever it raises is its error
            text = str(error) or type(error).__name__
            raise RequestError("template_error", f"chat template: {text}") from error


def eos_token_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a completion: what the model's files name, and the template's turn end.

    `eos_token_id` of `generation_config.json` and of `genai_config.json`'s `model`, the
    tokenizer's `eos_token`, and the special token that the chat template (if there is one) writes
    right after an assistant's message. Empty if none of them says anything.
    """
    config = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    genai = _read_json(folder / "genai_config.json").get("model") or {}
    eos = tokenizer.token_id(str(_special_tokens(config).get("eos_token", "")))
    found = {*_ids(generation.get("eos_token_id")), *_ids(genai.get("eos_token_id")), eos}
    found.add(_turn_end(folder, tokenizer))
    return frozenset(id for id in found if id is not None)


def _turn_end(folder: Path, tokenizer: Tokenizer) -> int | None:
    answer = "An answer."
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": answer}]
    try:
        text = ChatTemplate.load(folder).render(messages, add_generation_prompt=False)
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
        return _read_text(path), None
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


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _tojson
    return environment


def _compiled(source: str, folder: Path) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise WorkerError("model", f"{folder}: the chat template is not valid: {error}") from error


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML and sorts the keys."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime(now: datetime) -> Callable[[str], str]:
    return now.strftime


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_PROMPT_CHARACTERS:
            limit = f"{MAX_PROMPT_CHARACTERS} characters"
            raise RequestError("template_error", f"chat template: the prompt exceeds {limit}")
        yield piece


def _plain(message: Mapping[str, Any], at: int) -> dict[str, Any]:
    """The message as templates expect it: parts joined, arguments of calls as objects."""
    plain = dict(message)
    if isinstance(plain.get("content"), list):
        parts = enumerate(plain["content"])
        plain["content"] = "".join(_text(part, f"messages[{at}].content[{i}]") for i, part in parts)
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_call(call) for call in plain["tool_calls"]]
    return plain


def _text(part: Mapping[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise RequestError("unsupported_content", f"{where}: expected text, got {kind!r}")
    return str(part[kind])


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments are parsed because templates apply `tojson` to them; broken ones stay text."""
    function = dict(call.get("function") or {})
    try:
        function["arguments"] = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return dict(call)
    return {**call, "function": function}
