"""What common clients send beyond the 23 parameters: renamed, or dropped where it may be.

For the HTTP door alone, before `parse_params`; knows nothing of the other parameters, and leaves
whatever is wrong with them to be refused there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.errors import ParameterError
from orchestrator.spec import refusals
from orchestrator.spec.params import ChatParams, parse_params
from orchestrator.spec.refusals import Rank, Refusal

DROPPED = ("ignore_eos", "metadata", "min_tokens", "skip_special_tokens", "store")
_RENAMED = "max_completion_tokens"
_LARGEST = 2**31 - 1
_METADATA = "metadata"
_PAIRS, _KEY, _VALUE = 16, 64, 512


def compatible(raw: Mapping[str, object]) -> dict[str, object]:
    """`raw` as `parse_params` takes it; `raw` itself is left as it is.

    `max_completion_tokens` becomes `max_tokens`, the role `developer` becomes `system`, what is
    of no meaning here is dropped. Raises ParameterError where both limits are given, or where
    `max_completion_tokens` or `metadata` is none.
    """
    metadata_of(raw)
    body = {key: value for key, value in raw.items() if key not in DROPPED}
    if _RENAMED in body:
        _rename(body)
    if isinstance(options := body.get("stream_options"), Mapping):
        body["stream_options"] = {
            key: value for key, value in options.items() if key != "continuous_usage_stats"
        }
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = [_message(message) for message in messages]
    return body


def metadata_of(raw: Mapping[str, object]) -> dict[str, str] | None:
    """The caller's own words beside the parameters, None without any. Raises ParameterError."""
    value: Any = raw.get(_METADATA)
    if value is None:
        return None
    if refusal := refusals.first(_metadata(value)):
        raise refusal.error()
    return dict(value)


def _metadata(value: object) -> Iterator[Refusal]:
    if not isinstance(value, Mapping):
        yield refusals.wrong_type(_METADATA, "an object", value)
        return
    if len(value) > _PAIRS:
        message = (
            f"Invalid '{_METADATA}': too many properties. Expected an object with at most "
            f"{_PAIRS} properties, but got an object with {len(value)} properties instead."
        )
        code, got = "object_above_max_properties", str(len(value))
        yield Refusal(Rank.LENGTH, message, _METADATA, code, f"at most {_PAIRS} pairs", got)
    for key, each in value.items():
        path = f"{_METADATA}.{refusals.show(key)[1:-1]}"
        yield from _text(path, key, _KEY)
        yield from refusals.string(path, each)
        if isinstance(each, str):
            yield from _text(path, each, _VALUE)


def _text(path: str, value: str, most: int) -> Iterator[Refusal]:
    if len(value) > most:
        message = (
            f"Invalid '{path}': string too long. Expected a string with maximum length {most}, "
            f"but got a string with length {len(value)} instead."
        )
        code, plain = "string_above_max_length", f"at most {most} characters"
        yield Refusal(Rank.LENGTH, message, path, code, plain, str(len(value)))
    if "\0" in value:  # which no column of JSON can hold everywhere
        message = f"Invalid '{path}': U+0000 is not allowed."
        yield Refusal(Rank.PATTERN, message, path, "invalid_value", "no U+0000", "one")


def _rename(body: dict[str, object]) -> None:
    value = body.pop(_RENAMED)
    if value is None:
        return
    if body.get("max_tokens") is not None:
        raise ParameterError(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            _RENAMED,
            "invalid_value",
        )
    if refusal := refusals.first(refusals.number(_RENAMED, value, 1, _LARGEST, whole=True)):
        raise refusal.error()
    body["max_tokens"] = value


def _message(message: object) -> object:
    if isinstance(message, Mapping) and message.get("role") == "developer":
        return {**message, "role": "system"}
    return message


def body_of(given: Mapping[str, object], *, openai_compatible: bool) -> dict[str, object]:
    """The parameters word for word, without a `stream` that says that nothing is streamed."""
    body = compatible(given) if openai_compatible else dict(given)
    if "stream" in body and (body["stream"] is None or body["stream"] is False):
        del body["stream"]
    return body


def checked(body: Mapping[str, object], *, max_choices: int) -> ChatParams:
    """What `body_of` gave, parsed. Raises ParameterError, the first failure alone."""
    params = parse_params(body, streamed="stream" in body)
    beyond = refusals.first(refusals.number("n", params.n, 1, max_choices, whole=True))
    if beyond:
        raise beyond.error()
    return params
