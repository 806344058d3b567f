"""Entity tags of what is polled: asked again with `If-None-Match`, 304 while it is the same.

For every JSON answer of the status API, whatever its route. Knows nothing of what is answered.
"""

from __future__ import annotations

import hashlib
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_TAG = re.compile(r'(?:W/)?("[^"]*")')


class Tagged:
    """Gives each whole JSON answer to a GET its weak tag, and no body to who has it already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        polled = scope["type"] == "http" and scope["method"] == "GET"
        if not polled or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        known, start = Headers(scope=scope).getlist("if-none-match"), list[Message]()

        async def with_tag(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_json(message):
                start.append(message)
                return
            if start:
                first = start.pop()
                if not message.get("more_body", False):
                    _tag(first, message, ",".join(known))
                await send(first)
            await send(message)

        await self._app(scope, receive, with_tag)


def tag_of(body: bytes) -> str:
    """A weak tag: the same body, the same tag."""
    return f'W/"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'


def is_known(tag: str, known: str) -> bool:
    """Whether a list of tags, weak or strong, has this one; `*` has them all."""
    return known.strip() == "*" or tag.removeprefix("W/") in _TAG.findall(known)


def _is_json(start: Message) -> bool:
    kind = Headers(raw=start["headers"]).get("content-type", "")
    return start["status"] == 200 and kind.startswith("application/json")


def _tag(start: Message, body: Message, known: str) -> None:
    headers = MutableHeaders(scope=start)
    headers["etag"] = tag = tag_of(body.get("body", b""))
    if is_known(tag, known):
        start["status"], body["body"] = 304, b""
        for name in ("content-length", "content-type"):
            del headers[name]
