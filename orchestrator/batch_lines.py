"""The lines of a batch: those that come in, checked; those that go out, made of results.

An input line is {custom_id, method, url, body}; `body` is what `POST` to the url would take. Reads
a file line by line and never holds it. Knows nothing of rows, of folders or of a batch's state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator import export
from orchestrator.db.columns import to_json
from orchestrator.db.releases import DEADLINE
from orchestrator.db.views import Result
from orchestrator.errors import OF_THE_CLIENT, ParameterError
from orchestrator.spec.compat import body_of, checked
from orchestrator.spec.datasets import MAX_CUSTOM_ID
from orchestrator.spec.params import parse_body

ENDPOINT = "/v1/chat/completions"
MAX_ERRORS = 100
_LONGEST = 1000
_KEYS = ("custom_id", "method", "url", "body")
_CANCELLED = {"code": "batch_cancelled", "message": "This request was cancelled with its batch."}
_EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}


@dataclass(frozen=True, slots=True)
class Rules:
    """What a door takes: see the settings of these names; `max_line_bytes` bounds one line."""

    endpoint: str = ENDPOINT
    openai_compatible: bool = True
    max_lines: int = 50_000
    max_choices: int = 128
    max_line_bytes: int = 16 * 2**20


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong; `line` counts from 1, None where it is the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None

    def to_json(self) -> dict[str, object]:
        """As the batch's `errors.data` holds it."""
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "line": self.line,
        }


class _Refused(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def at(self, line: int) -> LineError:
        """With its line, and cut: what is wrong may be as long as the file."""
        param = self.param and self.param[:_LONGEST]
        return LineError(self.code, str(self)[:_LONGEST], param, line)


@dataclass(slots=True)
class Checked:
    """What one reading of a file found: the first errors, or nothing but a model and a count."""

    lines: int = 0
    model: str | None = None
    errors: list[LineError] = field(default_factory=list)


def check(path: Path, rules: Rules, serves: Callable[[str], bool]) -> Checked:
    """Read the file once and check every line, up to `MAX_ERRORS` errors.

    `serves`: whether there is a model of that name.
    """
    found, seen = Checked(), set[bytes]()
    for number, raw in _lines(path, rules.max_line_bytes):
        found.lines += 1
        if found.lines > rules.max_lines:
            text = f"The batch has more than {rules.max_lines} requests."
            found.errors.append(LineError("too_many_requests", text, None, number))
            break
        try:
            custom_id, body = _checked(raw, rules)
            _once(seen, custom_id)
            _one_model(found, str(body["model"]), serves)
        except _Refused as refused:
            found.errors.append(refused.at(number))
            if len(found.errors) == MAX_ERRORS:
                break
    if not found.lines:
        text = "The batch file is empty. It must contain at least one request."
        found.errors.append(LineError("empty_file", text))
    return found


def bodies(path: Path, rules: Rules) -> Iterator[tuple[str, dict[str, object]]]:
    """(custom_id, body) of each line of a file that was found right: the parameters to run."""
    for _, raw in _lines(path, rules.max_line_bytes):
        line: Any = parse_body(raw)
        body = body_of(line["body"], openai_compatible=rules.openai_compatible)
        yield line["custom_id"], body


def refused(path: Path, rules: Rules, error: ParameterError) -> LineError:
    """What cannot be run, of a file that was found right, at the line of its item."""
    if error.item is None:
        return LineError(error.code or "invalid_request", str(error), error.param)
    number, _ = next(islice(_lines(path, rules.max_line_bytes), error.item, None))
    return _of_body(error).at(number)


def _lines(path: Path, most: int) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank; of one too long only its beginning."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(most + 1):
            number += 1
            whole = raw
            while len(whole) > most and not whole.endswith(b"\n"):
                if not (whole := file.readline(most + 1)):
                    break
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield number, raw


def _checked(raw: bytes, rules: Rules) -> tuple[str, dict[str, object]]:
    if len(raw) > rules.max_line_bytes:
        text = f"This line is longer than {rules.max_line_bytes} bytes."
        raise _Refused("line_too_long", text)
    try:
        line = parse_body(raw)
    except ParameterError:
        raise _Refused("invalid_json_line", "This line is not parseable as valid JSON.") from None
    for key in line:
        if key not in _KEYS:
            raise _Refused("unknown_parameter", f"Unknown parameter: '{key}'.", key)
    for key in _KEYS:
        if key not in line:
            text = f"Missing required parameter: '{key}'."
            raise _Refused("missing_required_parameter", text, key)
    _head(line, rules)
    return str(line["custom_id"]), _checked_body(line["body"], rules)


def _head(line: Mapping[str, object], rules: Rules) -> None:
    custom_id = line["custom_id"]
    if not isinstance(custom_id, str):
        text = "Invalid type for 'custom_id': expected a string."
        raise _Refused("invalid_type", text, "custom_id")
    if not 0 < len(custom_id) <= MAX_CUSTOM_ID or "\0" in custom_id:
        text = f"Invalid 'custom_id': expected 1 to {MAX_CUSTOM_ID} characters, none of them NUL."
        raise _Refused("invalid_value", text, "custom_id")
    if line["method"] != "POST":
        text = "Invalid value for 'method': every request of a batch has the method 'POST'."
        raise _Refused("invalid_method", text, "method")
    if line["url"] != rules.endpoint:
        text = f"The URL of this request is not the batch's endpoint '{rules.endpoint}'."
        raise _Refused("invalid_url", text, "url")


def _checked_body(given: object, rules: Rules) -> dict[str, object]:
    if not isinstance(given, dict):
        raise _Refused("invalid_type", "Invalid type for 'body': expected an object.", "body")
    try:
        body = body_of(given, openai_compatible=rules.openai_compatible)
        checked(body, max_choices=rules.max_choices)
    except ParameterError as error:
        raise _of_body(error) from None
    return body


def _of_body(error: ParameterError) -> _Refused:
    param = f"body.{error.param}" if error.param else "body"
    return _Refused(error.code or "invalid_request", error.message, param)


def _once(seen: set[bytes], custom_id: str) -> None:
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    if digest in seen:
        text = f"The custom_id '{custom_id}' is used by another request of this batch."
        raise _Refused("duplicate_custom_id", text, "custom_id")
    seen.add(digest)


def _one_model(found: Checked, model: str, serves: Callable[[str], bool]) -> None:
    if found.model is None:
        if not serves(model):
            text = f"The model `{model}` does not exist or you do not have access to it."
            raise _Refused("model_not_found", text, "body.model")
        found.model = model
    elif model != found.model:
        text = f"The model '{model}' is not the model '{found.model}' of the rest of the batch."
        raise _Refused("mismatched_model", text, "body.model")


def line(result: Result) -> tuple[bool, bytes]:
    """Whether the request succeeded, and its line of the output file or of the error file.

    The same result gives the same bytes.
    """
    response, error = _outcome(result)
    told = {
        "id": f"batch_req_{_hex(result, 'line', 24)}",
        "custom_id": result.custom_id,
        "response": response,
        "error": error,
    }
    # ASCII alone: some readers take U+2028 for the end of a line.
    text = to_json(told)
    if not text.isascii():
        text = json.dumps(told, separators=(",", ":"))
    return result.state == "succeeded", text.encode() + b"\n"


def _outcome(result: Result) -> tuple[dict[str, object] | None, dict[str, str] | None]:
    if result.state == "succeeded":
        return _response(result, 200, export.completion(result)), None
    code, message = result.error or ("cancelled", "")
    if result.state == "cancelled":
        return None, dict(_EXPIRED if code == DEADLINE else _CANCELLED)
    of_the_client = code in OF_THE_CLIENT
    told = {
        "message": message or "The server had an error while processing your request.",
        "type": "invalid_request_error" if of_the_client else "server_error",
        "param": None,
        "code": code,
    }
    return _response(result, 400 if of_the_client else 500, {"error": told}), None


def _response(result: Result, status: int, body: dict[str, Any]) -> dict[str, object]:
    request_id = f"req_{_hex(result, 'request', 32)}"
    return {"status_code": status, "request_id": request_id, "body": body}


def _hex(result: Result, kind: str, digits: int) -> str:
    """A pure function of the request, so that a file written twice is the same twice."""
    of = f"{kind} {result.job_id} {result.request_id}".encode()
    return hashlib.blake2b(of, digest_size=digits // 2).hexdigest()
