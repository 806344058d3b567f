"""Who may make a browser ask: only pages of our own.

Two dangers. A page elsewhere sends a form or a fetch to us, and the browser adds the cookie, or
the connection counts as the machine's own: unsafe methods need the same origin, and a content
type that no form can send or the form's token. And a name that its owner points at 127.0.0.1
makes his page the same origin as ours: where no key is needed, the host must be called localhost.
Knows nothing of keys but the cookie's name.
"""

from __future__ import annotations

import hmac
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.api.errors import ApiError, answer

COOKIE = "penstock_session"
TOKEN_FIELD, TOKEN_HEADER = "csrf_token", "x-csrf-token"
SAFE = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))
LOCAL_NAMES = frozenset(("localhost", "127.0.0.1", "::1"))
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")


class SameOrigin:
    """Refuses what another site made a browser send, before any route is asked."""

    def __init__(self, app: ASGIApp, keys_needed: bool) -> None:
        self._app, self._keys_needed = app, keys_needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await answer(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if not self._keys_needed and not is_local(headers.get("host", "")):
            message = "Without API keys this server answers to localhost and 127.0.0.1 alone."
            return ApiError(403, message, code="host_not_allowed")
        by_key = self._keys_needed and "authorization" in headers
        if scope["method"] in SAFE or by_key or not is_foreign(headers):
            return None
        return ApiError(403, "Another site may not ask this.", code="cross_site")


def is_local(host: str) -> bool:
    """Whether a Host header names this machine, on whatever port."""
    try:
        return urlsplit(f"//{host}").hostname in LOCAL_NAMES
    except ValueError:
        return False


def is_foreign(headers: Headers) -> bool:
    """Whether a browser says that a page of another origin asks."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    except ValueError:
        return True


def csrf_token(request: Request) -> str:
    """The token that a form of our own carries in the field `csrf_token`.

    Made of the session's cookie, so that every process knows it; without one, of a secret of this
    process, and a form from before a restart must be loaded again.
    """
    session = request.cookies.get(COOKIE, "").encode()
    key = session or request.app.state.form_secret
    return hmac.digest(key, b"penstock form", "sha256").hex()


async def check_form(request: Request) -> None:
    """Raises 403 unless the token came along: in a header, or a field of an urlencoded form."""
    given = request.headers.get(TOKEN_HEADER)
    if given is None and _content_type(request) == _FORMS[0]:
        field = (await request.form()).get(TOKEN_FIELD)
        given = field if isinstance(field, str) else None
    if given is None or not hmac.compare_digest(given.encode(), csrf_token(request).encode()):
        raise ApiError(403, "The form is too old, or not ours: load the page again.", code="csrf")


async def check_unsafe(request: Request) -> None:
    """What a browser's request must have besides its origin when no key in a header vouches.

    A body that a plain form could have sent needs the form's token. Programs that are no browser
    say nothing of where they come from and have no cookie: for them there is nothing to check.
    """
    if request.method in SAFE:
        return
    headers = request.headers
    browser = "origin" in headers or "sec-fetch-site" in headers or COOKIE in request.cookies
    if browser and _content_type(request) in _FORMS:
        await check_form(request)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


CheckedForm = Annotated[None, Depends(check_form)]
"""For a route that takes a form before anybody is known: the login."""
