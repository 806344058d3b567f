"""Errors as every door tells them: `{"error": {message, type, param, code}}`, all four always.

Knows which status an error of ours has; nothing of routes. What is no error of ours is a bug: it
ends in `logs.py`, as a 500 without detail.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from orchestrator.errors import (
    Conflict,
    NotFound,
    ParameterError,
    PenstockError,
    RequestError,
    SpecError,
    WorkerError,
)

INVALID, SERVER = "invalid_request_error", "server_error"
RETRY_SECONDS = 5

ErrorPage = Callable[[Request, "ApiError"], Response]
"""How the pages show an error to a browser that asked for a page."""

log = logging.getLogger("penstock.http")


class ApiError(Exception):
    """What a route refuses by itself; `headers` go with the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def to_json(self) -> dict[str, dict[str, str | None]]:
        """The body of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str = Field(description="What was refused, or failed, and why; written for people.")
    type: str = Field(
        description="`invalid_request_error`, `requests` (too many), or `server_error`."
    )
    param: str | None = Field(description="The parameter it was about, where it was about one.")
    code: str | None = Field(
        description="A word for programs, such as `invalid_api_key`; null where there is none."
    )


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorObject = Field(description="The error.")


def answer(error: ApiError) -> JSONResponse:
    """The error as JSON."""
    return JSONResponse(error.to_json(), status_code=error.status, headers=error.headers)


def internal() -> ApiError:
    """A bug, as it is told: without any detail."""
    message = "The server had an error while it handled your request. Its id is in x-request-id."
    return ApiError(500, message, type=SERVER, headers={"x-should-retry": "false"})


def install(app: FastAPI, page: ErrorPage | None = None) -> None:
    """Every error of ours, of the framework and of its validation gets the one form.

    `page`: asked instead where a browser asks for a page (not under /api or /v1).
    """

    def told(request: Request, error: Exception) -> Response:
        known = of(error)
        if known.status == 405:
            known.headers["allow"] = _allowed(request) or known.headers.get("allow", "")
        if page is not None and _wants_page(request):
            return page(request, known)
        return answer(known)

    for kind in (ApiError, PenstockError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, told)


def _allowed(request: Request) -> str:
    """The methods of that path; the router would name those of the first route alone."""
    found: set[str] = set()
    for template, item in request.app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), request.url.path):
            found |= {method.upper() for method in item}
    return ", ".join(sorted(found))


def of(error: Exception) -> ApiError:
    """Any error as the API tells it."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return _framework(error)
        case PenstockError():
            return _ours(error)
    return internal()


def _ours(error: PenstockError) -> ApiError:
    match error:
        case ParameterError():
            message = str(error) if error.where else error.message
            return ApiError(400, message, param=error.param, code=error.code)
        case SpecError():
            return ApiError(400, str(error), code="invalid_job")
        case NotFound():
            return ApiError(404, str(error))
        case Conflict():
            return ApiError(409, str(error), headers={"x-should-retry": "false"})
        case RequestError():
            return ApiError(400, error.message, code=error.code)
        case WorkerError():
            return unavailable(error)
    return internal()


def unavailable(error: WorkerError) -> ApiError:
    """503; where and why stands in the log, since hosts and paths are nobody else's affair."""
    log.warning("http.unavailable code=%s error=%s", error.code, error)
    return ApiError(
        503,
        f"The {error.code} is not available just now. Please try again.",
        type=SERVER,
        code=f"{error.code}_unavailable",
        headers={"retry-after": str(RETRY_SECONDS)},
    )


def _framework(error: HTTPException) -> ApiError:
    """A 404 of no route, a 405, a body that cannot be read."""
    known = {404: "Unknown request URL.", 405: "Not allowed method for this URL."}
    phrase = HTTPStatus(error.status_code).phrase
    detail = error.detail if isinstance(error.detail, str) and error.detail != phrase else None
    kind = SERVER if error.status_code >= 500 else INVALID
    message = detail or known.get(error.status_code, phrase + ".")
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    code = _OF_BODIES.get(error.status_code)
    return ApiError(error.status_code, message, type=kind, code=code, headers=headers)


_OF_BODIES = {408: "body_too_slow", 413: "body_too_large"}
_SHOWN = 80
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
}


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that validation refused; of headers and bodies not what was given."""
    first = error.errors()[0]
    kind = str(first["type"])
    place = [str(each) for each in first["loc"]]
    param = ".".join(place[1:]) or None
    if kind == "json_invalid":
        return ApiError(400, "We could not parse the JSON body of your request.", code=None)
    code = _CODES.get(kind)
    if code is None:
        code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    what = f"'{param}'" if param else "body"
    got = f", got {str(first['input'])[:_SHOWN]!r}" if place[0] in ("path", "query") else ""
    return ApiError(400, f"Invalid {what}: {first['msg']}{got}.", param=param, code=code)


def _wants_page(request: Request) -> bool:
    under_api = request.url.path.startswith(("/api", "/v1"))
    return not under_api and "text/html" in request.headers.get("accept", "")
