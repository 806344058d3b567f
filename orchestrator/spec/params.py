"""The 23 parameters of a streamed chat completion: parsed, defaulted, or refused.

Texts, codes and their order are those of the reference (chat-completions-streaming.md, 1.1 and
1.2). Knows nothing of files, templates or the model: the vocabulary's size is a number handed
in where it is known.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.errors import ParameterError
from orchestrator.spec import messages, refusals, tools
from orchestrator.spec.messages import Message
from orchestrator.spec.refusals import Rank, Refusal

MAX_STOPS = 4
INT64 = 2**63
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "temperature": (0, 2),
    "top_p": (0, 1),
}
_INTEGERS: Mapping[str, tuple[int, int]] = {
    "max_tokens": (1, 2**31 - 1),
    "n": (1, 128),
    "seed": (-INT64, INT64 - 1),
    "top_logprobs": (0, 20),
}
_SERVICE_TIERS = ("auto", "default")
_BIAS_KEY = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class ChatParams:
    """One request's parameters, named as in the API; None where nothing was given.

    `messages` have their text parts joined; `logit_bias` maps token ids to an additive bias;
    `stop` is a tuple, empty for none; `seed` is an int64.
    """

    messages: tuple[Message, ...]
    model: str
    stream: bool = True
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    function_call: str | Mapping[str, object] | None = None
    functions: tuple[Mapping[str, object], ...] | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int | None = None
    max_tokens: int | None = None
    n: int = 1
    parallel_tool_calls: bool = True
    response_format: Mapping[str, object] | None = None
    seed: int | None = None
    service_tier: str | None = None
    stop: tuple[str, ...] = ()
    stream_options: Mapping[str, object] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    tool_choice: str | Mapping[str, object] | None = None
    tools: tuple[Mapping[str, object], ...] | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends in a chunk of usage."""
        return bool((self.stream_options or {}).get("include_usage"))


NAMES = tuple(ChatParams.__dataclass_fields__)
NULLABLE = frozenset(
    (*_NUMBERS, *_INTEGERS, "logit_bias", "logprobs", "service_tier", "stop", "stream_options")
)


def parse_body(body: bytes | str) -> dict[str, object]:
    """A request's JSON text as the object that `parse_params` takes.

    Raises `ParameterError` where it is no JSON object in UTF-8: NaN, Infinity, numbers beyond
    doubles and halves of surrogate pairs are not JSON here.
    """
    try:
        text = body.decode() if isinstance(body, bytes) else body
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    error = ParameterError("We could not parse the JSON body of your request.")
    error.expected, error.got = "a JSON object", "something else"
    raise error


def _no_number(word: str) -> float:
    raise ValueError(word)


def _finite(digits: str) -> float:
    return number if math.isfinite(number := float(digits)) else _no_number(digits)


def parse_params(
    raw: Mapping[str, object],
    *,
    vocab_size: int | None = None,
    rendered: bool = True,
    streamed: bool = True,
) -> ChatParams:
    """`raw` (plain JSON values) as `ChatParams`.

    Raises `ParameterError` with the first failure in the reference's order; its `expected` and
    `got` say the same in plain words. `stream` may be left out: it is true here.
    `vocab_size`, where known, bounds the keys of `logit_bias`. `rendered` is false where the
    messages' words are not final: what depends on them is not checked then.
    `streamed` is false where a door answers with a whole completion: no `stream_options` then.
    """
    refusal = refusals.first(_check(raw, vocab_size, rendered, streamed))
    if refusal:
        raise refusal.error()
    return _parsed({key: value for key, value in raw.items() if value is not None})


def _check(
    raw: Mapping[str, object], vocab_size: int | None, rendered: bool, streamed: bool
) -> Iterator[Refusal]:
    yield from refusals.keys(raw, "", NAMES, ("messages", "model"))
    given = {key: value for key, value in raw.items() if value is not None or key not in NULLABLE}
    if "messages" in given:
        yield from messages.check(given["messages"])
    for key, (low, high) in _NUMBERS.items():
        if key in given:
            yield from refusals.number(key, given[key], low, high, whole=False)
    for key, (minimum, maximum) in _INTEGERS.items():
        if key in given:
            yield from refusals.number(key, given[key], minimum, maximum, whole=True)
    for key in ("logprobs", "parallel_tool_calls", "stream"):
        if key in given:
            yield from refusals.boolean(key, given[key])
    yield from _words(given)
    yield from _stop(given)
    yield from _stream_options(given, streamed)
    yield from _logit_bias(given, vocab_size)
    yield from _top_logprobs(given)
    yield from tools.check(given)
    if rendered:
        yield from _json_word(given)


def _json_word(given: Mapping[str, object]) -> Iterator[Refusal]:
    shape = given.get("response_format")
    asked = isinstance(shape, Mapping) and shape.get("type") == "json_object"
    if asked and not messages.mention(given.get("messages"), "json"):
        text = (
            "'messages' must contain the word 'json' in some form, to use 'response_format' of "
            "type 'json_object'."
        )
        plain = "the word 'json' in a message, as 'response_format' is of type 'json_object'"
        yield Refusal(Rank.JSON_WORD, text, "messages", None, plain, "none")


def _words(given: Mapping[str, object]) -> Iterator[Refusal]:
    for key in ("model", "user", "service_tier"):
        if key in given:
            yield from refusals.string(key, given[key])
    tier = given.get("service_tier")
    if isinstance(tier, str) and tier not in _SERVICE_TIERS:
        yield refusals.wrong_value("service_tier", _SERVICE_TIERS, tier)
    if given.get("stream") is False:
        text = "Invalid value: 'false'. Supported value is: 'true'."
        yield Refusal(Rank.VALUE, text, "stream", "invalid_value", "true", "false")


def _stop(given: Mapping[str, object]) -> Iterator[Refusal]:
    stop = given.get("stop")
    if isinstance(stop, str):
        yield from _stop_string("stop", stop)
    elif isinstance(stop, list | tuple):
        if not stop:
            yield refusals.empty("stop")
        if len(stop) > MAX_STOPS:
            yield refusals.too_long("stop", MAX_STOPS, len(stop))
        for position, each in enumerate(stop):
            yield from _stop_string(f"stop[{position}]", each)
    elif stop is not None:
        expected = f"a string or a list of 1 to {MAX_STOPS} strings"
        yield refusals.wrong_type("stop", "one of a string or array of strings", stop, expected)


def _stop_string(path: str, value: object) -> Iterator[Refusal]:
    yield from refusals.string(path, value)
    if value == "":
        yield refusals.empty_string(path)


def _stream_options(given: Mapping[str, object], streamed: bool) -> Iterator[Refusal]:
    options = given.get("stream_options")
    if options is not None and not streamed:
        text = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        plain = "'stream_options' only together with 'stream: true'"
        yield Refusal(Rank.STREAM_OPTIONS, text, "stream_options", None, plain, "no 'stream'")
    if isinstance(options, Mapping):
        yield from refusals.keys(options, "stream_options", ("include_usage",), ())
        if "include_usage" in options:
            yield from refusals.boolean("stream_options.include_usage", options["include_usage"])
    elif options is not None:
        yield refusals.wrong_type("stream_options", "an object", options)


def _logit_bias(given: Mapping[str, object], vocab_size: int | None) -> Iterator[Refusal]:
    bias = given.get("logit_bias")
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        yield refusals.wrong_type(
            "logit_bias", "an object", bias, "a mapping of token ids to numbers"
        )
        return
    for key, value in bias.items():
        yield from refusals.number(f"logit_bias.{key}", value, -100, 100, whole=False)
        if not _BIAS_KEY.fullmatch(str(key)):
            text = "You should only be submitting non-negative integers."
            yield _bias_key(key, text, "a token id")
        elif vocab_size is not None and int(key) >= vocab_size:
            text = f"Maximum value is {vocab_size - 1}."
            yield _bias_key(key, text, f"a token id from 0 to {vocab_size - 1}")


def _bias_key(key: str, reason: str, expected: str) -> Refusal:
    text = f"Invalid key in 'logit_bias': {key}. {reason}"
    return Refusal(Rank.BIAS_KEY, text, "logit_bias", None, expected, f"'{key}'")


def _top_logprobs(given: Mapping[str, object]) -> Iterator[Refusal]:
    if "top_logprobs" in given and given.get("logprobs") is not True:
        text = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
        plain = "'top_logprobs' only together with 'logprobs: true'"
        got = (
            f"'logprobs: {refusals.show(given['logprobs'])}'"
            if "logprobs" in given
            else "no 'logprobs'"
        )
        yield Refusal(Rank.TOP_LOGPROBS, text, "top_logprobs", None, plain, got)


def _parsed(given: Mapping[str, object]) -> ChatParams:
    values: dict[str, object] = dict(given)
    values["messages"] = messages.joined(given["messages"])  # type: ignore[arg-type]
    for key in _NUMBERS.keys() & values.keys():
        values[key] = float(values[key])  # type: ignore[arg-type]
    if isinstance(bias := values.get("logit_bias"), Mapping):
        values["logit_bias"] = {int(key): float(value) for key, value in bias.items()}
    if (stop := values.get("stop")) is not None:
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)  # type: ignore[arg-type]
    return ChatParams(**values)  # type: ignore[arg-type]
