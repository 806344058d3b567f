"""How much one caller may ask: bytes of a body, seconds to send it, streams, requests a minute.

Knows nothing of what is asked; who asks is said by `auth.py`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.api.errors import ApiError, answer
from orchestrator.settings import Settings

UPLOADS = ("/v1/files",)
MIB = 1024 * 1024
BODY_SECONDS = 60.0
"""How long a body may send nothing before the request is given up."""
_STREAMED = ("text/event-stream", "application/x-ndjson")
_FORM_BYTES = 64 * 1024
_FULL_AGAIN_SECONDS = 60.0
_MOST_CALLERS = 10_000


class Limited:
    """Refuses bodies that are too long or too slow, and one stream too many."""

    def __init__(self, app: ASGIApp, settings: Settings, streams: Streams) -> None:
        self._app, self._streams = app, streams
        self._body = settings.max_body_mib * MIB
        self._upload = settings.max_upload_mib * MIB + _FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._upload if scope["path"].rstrip("/") in UPLOADS else self._body
        if refused := _refused_by(Headers(scope=scope), most):
            await answer(refused)(scope, receive, send)
            return
        streaming = _Streaming(self._streams, scope, send)
        try:
            await self._app(scope, _bounded(receive, most), streaming.send)
        except Exception:  # whatever the route's own tasks made of the refusal
            if not streaming.refused:
                raise
        finally:
            streaming.close()
        if streaming.refused:
            await answer(_too_many_streams())(scope, receive, send)


class Streams:
    """How many streams are open; used by the event loop's thread alone."""

    def __init__(self, most: int) -> None:
        self.most, self.open = most, 0


class _Refused(Exception):
    """Ends the route whose stream is one too many."""


class _Streaming:
    """One answer on its way: counted while it is a stream of events or of lines."""

    def __init__(self, streams: Streams, scope: Scope, send: Send) -> None:
        self._streams, self._scope, self._send = streams, scope, send
        self._counted = self.refused = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(self._scope.get("state", {}).get("rate_headers", {}))
            if headers.get("content-type", "").startswith(_STREAMED):
                self._count()
        await self._send(message)

    def _count(self) -> None:
        if self._streams.open >= self._streams.most:
            self.refused = True
            raise _Refused
        self._streams.open += 1
        self._counted = True

    def close(self) -> None:
        if self._counted:
            self._streams.open -= 1


def check_streams(request: Request) -> None:
    """Refuse a stream before anything is done for it: 429 when too many are open."""
    streams: Streams = request.app.state.streams
    if streams.open >= streams.most:
        raise _too_many_streams()


def _too_many_streams() -> ApiError:
    message = "Too many streams are open. Please try again later."
    headers = {"retry-after": "5"}
    return ApiError(429, message, type="requests", code="too_many_streams", headers=headers)


# --- bodies ---------------------------------------------------------------------------------------


def _refused_by(headers: Headers, most: int) -> ApiError | None:
    """What the head alone says of a body that is not taken."""
    length, encoding = headers.get("content-length", ""), headers.get("content-encoding", "")
    if length.isdecimal() and int(length) > most:
        return _too_large(most)
    if encoding.lower() not in ("", "identity"):
        message = f"Bodies are taken as they are, not with Content-Encoding: {encoding[:40]}."
        code = "unsupported_media_type"
        return ApiError(415, message, param="content-encoding", code=code)
    return None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than {most // MIB} MiB.", code="body_too_large")


_CLOSED = {"connection": "close"}  # else the server would take in what is left of the body


def _bounded(receive: Receive, most: int) -> Callable[[], Awaitable[Message]]:
    """The body's pieces, counted as they come: what a header says of them is no promise."""
    taken, whole = 0, False

    async def bounded() -> Message:
        nonlocal taken, whole
        if whole:  # what comes now is a disconnect, perhaps in hours
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), BODY_SECONDS)
        except TimeoutError:
            raise HTTPException(408, "The body was not sent in time.", _CLOSED) from None
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > most:
                # The framework's own kind: it would make a 400 of any other.
                raise HTTPException(413, _too_large(most).message, _CLOSED)
        return message

    return bounded


# --- requests a minute ----------------------------------------------------------------------------


class Rates:
    """A bucket of a minute's requests for each caller; it fills as the minute goes."""

    def __init__(self, per_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._now = per_minute, now
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, who: str) -> tuple[bool, int, float]:
        """Whether one more may be asked, how many after it, seconds until the bucket is full."""
        now = self._now()
        left, then = self._left.get(who, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
        allowed = left >= 1
        left -= allowed
        if who not in self._left and len(self._left) >= _MOST_CALLERS:
            self._forget_full(now)
        self._left[who] = (left, now)
        return allowed, int(left), (self.per_minute - left) * 60 / self.per_minute

    def _forget_full(self, now: float) -> None:
        full = now - _FULL_AGAIN_SECONDS
        self._left = {who: each for who, each in self._left.items() if each[1] > full}


def check_rate(request: Request, who: str) -> None:
    """Count a request of this caller: 429 beyond the limit; headers say what is left."""
    rates: Rates = request.app.state.rates
    if rates.per_minute == 0:
        return
    allowed, left, full = rates.take(who)
    headers = {
        "x-ratelimit-limit-requests": str(rates.per_minute),
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": f"{full:.1f}s",
    }
    request.state.rate_headers = headers
    if not allowed:
        raise ApiError(
            429,
            f"Rate limit reached: {rates.per_minute} requests a minute. Please try again later.",
            type="requests",
            code="rate_limit_exceeded",
            headers={"retry-after": str(math.ceil(60 / rates.per_minute))},
        )
