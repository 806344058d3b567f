"""The bytes of a submitted job -> its plan, or what is refused of it.

YAML and JSON alike. Datasets stand in the job, or are files under the configured roots; what else
a job may name is refused. Knows nothing of routes or rows.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from orchestrator.api.errors import ApiError
from orchestrator.errors import SpecError
from orchestrator.settings import Settings
from orchestrator.spec.job import JobSpec, parse_job
from orchestrator.spec.plan import Plan, plan

JSON_TYPE = "application/json"
YAML_TYPES = ("application/yaml", "text/yaml", "application/x-yaml", "text/x-yaml", "text/plain")
_NOWHERE = Path(os.devnull)
_PATH = ": dataset.path"
# What JSON writes of a character beyond the first plane, or a backslash that only looks like it.
_PAIR = re.compile(r"\\(?:\\|u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2}))")


def planned(body: bytes, content_type: str | None, settings: Settings) -> Plan:
    """The plan of the job in the body. Takes as long as its dataset: not for the event loop.

    Raises SpecError, and ApiError (415) for what is neither YAML nor JSON.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind == JSON_TYPE:
        spec = _parsed(_yaml_of_json(body), "job.json", settings)
    elif kind in YAML_TYPES:
        spec = _parsed(_text(body), "job.yaml", settings)
    else:
        known = ", ".join((JSON_TYPE, *YAML_TYPES))
        message = f"The body has to be a job as one of {known}."
        raise ApiError(415, message, param="content-type", code="unsupported_media_type")
    return plan(spec)


def roots(settings: Settings) -> tuple[Path, ...]:
    """The folders under which datasets may lie."""
    return tuple(Path(root) for root in settings.input_roots.split(":") if root)


def _parsed(text: str, file: str, settings: Settings) -> JobSpec:
    """The job, its dataset's path looked for under one root after the other."""
    allowed = roots(settings)
    refused: list[SpecError] = []
    for root in allowed or (_NOWHERE,):
        try:
            return parse_job(text, file=file, root=root)
        except SpecError as error:
            if not getattr(error, "where", "").endswith(_PATH):
                raise
            refused.append(error)
    expected = "a JSON Lines file under a folder that is open to jobs"
    if not allowed:
        expected = "'items' in the job itself: no folder is open to jobs that come over HTTP"
    raise SpecError(refused[0].where, expected, refused[0].got) from None


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError("job", "text in UTF-8", "other bytes") from None


def _yaml_of_json(body: bytes) -> str:
    """The same values as YAML reads them: JSON, but for characters that it writes as a pair."""
    try:
        value = json.loads(_text(body), object_pairs_hook=_once, parse_constant=_no_number)
        text = json.dumps(value, indent=2)
    except (ValueError, RecursionError) as error:
        reason = error.args[0] if isinstance(error, ValueError) else "too many levels"
        raise SpecError("job.json", "a job in JSON", str(reason).lower()[:200]) from None
    return _PAIR.sub(_character, text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the same key twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name}, which is no number in JSON")


def _character(found: re.Match[str]) -> str:
    if found[1] is None:
        return found[0]
    high, low = int(found[1], 16), int(found[2], 16)
    return f"\\U{0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00:08X}"
