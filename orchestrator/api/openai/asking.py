"""The bytes of a chat request -> what is asked for, or the API's own refusal of it.

Knows nothing of HTTP, of rows, or of which models there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import ParameterError
from orchestrator.spec import refusals
from orchestrator.spec.compat import compatible
from orchestrator.spec.params import ChatParams, parse_body, parse_params


@dataclass(frozen=True, slots=True)
class Asked:
    """`body`: the parameters word for word, without `stream` where nothing is streamed."""

    body: Mapping[str, object]
    params: ChatParams
    streamed: bool


def asked(raw: bytes, *, openai_compatible: bool, max_choices: int) -> Asked:
    """What the request's bytes ask for. Raises ParameterError, the first failure alone."""
    given = parse_body(raw)
    if openai_compatible:
        given = compatible(given)
    body = {
        key: value
        for key, value in given.items()
        if key != "stream" or not (value is None or value is False)
    }
    params = parse_params(body)
    streamed = "stream" in body
    if params.stream_options is not None and not streamed:
        text = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise ParameterError(text, "stream_options")
    beyond = refusals.first(refusals.number("n", params.n, 1, max_choices, whole=True))
    if beyond:
        raise beyond.error()
    return Asked(body, params, streamed)
