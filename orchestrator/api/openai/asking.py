"""The bytes of a chat request -> what is asked for, or the API's own refusal of it.

Knows nothing of HTTP, of rows, or of which models there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.spec.compat import body_of, checked, metadata_of
from orchestrator.spec.params import ChatParams, parse_body


@dataclass(frozen=True, slots=True)
class Asked:
    """`body`: the parameters word for word, without `stream` where nothing is streamed.

    `metadata`: the caller's own words beside them.
    """

    body: Mapping[str, object]
    params: ChatParams
    streamed: bool
    metadata: Mapping[str, str] | None = None


def asked(raw: bytes, *, openai_compatible: bool, max_choices: int) -> Asked:
    """What the request's bytes ask for. Raises ParameterError, the first failure alone."""
    given = parse_body(raw)
    body = body_of(given, openai_compatible=openai_compatible)
    params = checked(body, max_choices=max_choices)
    return Asked(body, params, "stream" in body, metadata_of(given))
