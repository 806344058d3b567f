"""The OpenAPI document: what the routes say of themselves, and what is true of all of them.

Every operation can fail as all can: those errors are written here once. Knows nothing of single
routes.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from orchestrator.api.errors import ErrorBody, ErrorObject

_COMMON = {
    "400": "What was sent cannot be understood, or is refused; `param` says which part. Codes: "
    "`invalid_type`, `invalid_value`, `missing_required_parameter`, `unknown_parameter`; of a job "
    "`invalid_job`; of parameters and prompts OpenAI's own, such as `context_length_exceeded`; "
    "null where the body cannot be parsed.",
    "403": "The key lacks the scope (`insufficient_scope`), or another site made a browser ask "
    "(`cross_site`, `host_not_allowed`, `csrf`).",
    "404": "It does not exist, or is somebody else's; a model at `/v1`: `model_not_found`.",
    "408": "The body was not sent in time (`body_too_slow`).",
    "413": "The body (`body_too_large`) or the file (`file_too_large`) is too large.",
    "415": "The body is packed, or of a kind that is not taken (`unsupported_media_type`).",
    "429": "Too many requests (`rate_limit_exceeded`) or open streams (`too_many_streams`); "
    "`Retry-After` says when to come again.",
    "500": "A fault of the server; the header `x-request-id` names the request in its log.",
    "503": "The database is away (`database_unavailable`); `Retry-After` says when to come again.",
}
_KEY = {"401": "No valid API key was given (`invalid_api_key`)."}
_OPEN = ("/api/health", "/api/openapi.json")
_METHODS = ("get", "put", "post", "delete", "patch")


def describe(app: FastAPI, *, keys_needed: bool) -> dict[str, Any]:
    """The document of the application's routes, each with every error that it can answer."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in (ErrorObject, ErrorBody):
        schemas[model.__name__] = model.model_json_schema(
            ref_template="#/components/schemas/{model}"
        )
        schemas[model.__name__].pop("$defs", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if keys_needed:
        document["components"]["securitySchemes"] = _SCHEMES
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                _complete(item[method], keys_needed and path not in _OPEN)
        if path.startswith("/api/") and "get" in item:
            _tagged(item["get"])
    return document


_SCHEMES = {
    "key": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, `psk_...`, made by `penstock keys create`. Its scopes: `read`; "
        "`submit`, which reads too; `admin`, which sees every owner's jobs.",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": "penstock_session",
        "description": "The same key in the cookie of the pages. What changes something must come "
        "from the same origin.",
    },
}


def _complete(operation: dict[str, Any], keyed: bool) -> None:
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    errors = {**_COMMON, **(_KEY if keyed else {})}
    for status, text in errors.items():
        told = responses.setdefault(status, {"description": text})
        told.setdefault("content", _error_content())
    for status, told in responses.items():
        if status.startswith(("4", "5")):
            told.setdefault("content", _error_content())
    if keyed:
        operation["security"] = [{"key": []}, {"session": []}]
    operation["responses"] = dict(sorted(responses.items()))


def _tagged(operation: dict[str, Any]) -> None:
    """What is polled has a tag: see `tags.py`."""
    told = operation["responses"]["200"]
    if "application/json" not in told.get("content", {}):
        return
    told["headers"] = {"ETag": {"description": "Of this answer.", "schema": {"type": "string"}}}
    operation["responses"]["304"] = {"description": "It is as the header If-None-Match has it."}
    operation["responses"] = dict(sorted(operation["responses"].items()))
    given = {"name": "If-None-Match", "in": "header", "required": False}
    given |= {"schema": {"type": "string"}, "description": "An `ETag` from before, or several."}
    operation.setdefault("parameters", []).append(given)


def _error_content() -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
