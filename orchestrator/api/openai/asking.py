"""The bytes of a chat request -> what is asked for, or the API's own refusal of it.

Knows nothing of HTTP, of rows, or of which models there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.spec.compat import body_of, checked
from orchestrator.spec.params import ChatParams, parse_body


@dataclass(frozen=True, slots=True)
class Asked:
    """`body`: the parameters word for word, without `stream` where nothing is streamed."""

    body: Mapping[str, object]
    params: ChatParams
    streamed: bool


def asked(raw: bytes, *, openai_compatible: bool, max_choices: int) -> Asked:
    """What the request's bytes ask for. Raises ParameterError, the first failure alone."""
    body = body_of(parse_body(raw), openai_compatible=openai_compatible)
    return Asked(body, checked(body, max_choices=max_choices), "stream" in body)
