"""One line for each request: which route, how it ended, how long it took, whose key.

A line has the route's template in place of the path, and never a query, a body, a key or a header
of the client's: what people send may be secret. A bug is logged with the places of its traceback,
without the error's text, which may hold what was sent. Knows nothing of routes.
"""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from contextvars import ContextVar

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.api import errors
from orchestrator.api.waits import Stopped

REQUEST_ID: ContextVar[str | None] = ContextVar("penstock_request_id", default=None)

log = logging.getLogger("penstock.http")


class Logged:
    """Gives each request its id, logs how it ended, and answers 500 for what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id, began, status = "req_" + secrets.token_hex(12), time.monotonic(), 0
        scope.setdefault("state", {})["request_id"] = id

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        token = REQUEST_ID.set(id)
        try:
            await self._app(scope, receive, with_id)
        except Stopped:
            log.info("http.cut request=%s: the server is stopping", id)
        except Exception as error:
            log.error("http.failed request=%s %s", id, places(error))
            if status == 0:  # else the connection is closed in the middle, which is all there is
                await errors.answer(errors.internal())(scope, receive, with_id)
        finally:
            _line(scope, id, status, 1000 * (time.monotonic() - began))
            REQUEST_ID.reset(token)


def places(error: BaseException) -> str:
    """What kind of error, and where: no text of it, no values, on one line."""
    found = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{each.filename}:{each.lineno}:{each.name}" for each in reversed(found))
    causes = [type(error).__name__]
    if isinstance(error, BaseExceptionGroup):
        causes += [type(each).__name__ for each in error.exceptions]
    cause = error.__cause__ or error.__context__
    if cause is not None:
        causes.append(f"from {type(cause).__name__}")
    return f"error={','.join(causes)} at={where}"


def _line(scope: Scope, id: str, status: int, milliseconds: float) -> None:
    log.info(
        "http method=%s route=%s status=%s ms=%.1f key=%s request=%s",
        scope["method"],
        _template(scope),
        status or "-",
        milliseconds,
        scope["state"].get("key_id") or "-",
        id,
    )


def _template(scope: Scope) -> str:
    """The path of the route as it is written, `/api/jobs/{job}`; a dash where none was found."""
    # A route of a router in a router knows the end of its path alone; fastapi keeps the whole.
    whole = scope.get("fastapi", {}).get("effective_route_context")
    found = getattr(whole, "path_format", None) or getattr(scope.get("route"), "path", None)
    return found or "-"


class RequestIdFilter(logging.Filter):
    """Puts the request's id behind what is logged while one is handled."""

    def filter(self, record: logging.LogRecord) -> bool:
        id = REQUEST_ID.get()
        if id is not None and record.name != log.name and not hasattr(record, "request_id"):
            record.request_id = id
            record.msg = f"{record.msg} request={id}"
        return True
