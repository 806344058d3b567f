"""Who asks, and what they may: API keys, scopes, owners.

A key is `psk_` and 43 letters; the database has its SHA-256 alone. Whoever has the scope `admin`
sees every job, others those of their owner; what they may not see does not exist for them. A key
that was found is believed for half a minute, so a revoked one is refused within that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

from anyio import to_thread
from fastapi import Depends, Request, Response

from orchestrator.api.context import Context, Ctx
from orchestrator.api.errors import ApiError
from orchestrator.api.limits import check_rate
from orchestrator.api.origins import COOKIE, check_unsafe
from orchestrator.db.keys import Key, digest, find_key, mark_used

READ, SUBMIT, ADMIN = "read", "submit", "admin"
_IMPLIED = {READ: {READ}, SUBMIT: {READ, SUBMIT}, ADMIN: {READ, SUBMIT, ADMIN}}
BELIEVED_SECONDS = 30.0
_MOST_BELIEVED = 10_000


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever asks. `owner` is stored with what they submit, empty for the machine's own."""

    owner: str
    scopes: frozenset[str]
    key_id: str | None = None

    @property
    def sees(self) -> str | None:
        """The owner whose jobs are seen; None: all."""
        return None if ADMIN in self.scopes else self.owner


LOCAL = Caller("", frozenset((READ, SUBMIT, ADMIN)))


class Believed:
    """The callers of keys that were found lately, by the keys' hashes."""

    def __init__(self) -> None:
        self._callers: dict[str, tuple[float, Caller]] = {}

    def get(self, hash: str) -> Caller | None:
        """The caller of that key, if it was looked up in the last half minute."""
        until, caller = self._callers.get(hash, (0.0, None))
        return caller if time.monotonic() < until else None

    def put(self, hash: str, caller: Caller) -> None:
        """Believe it from now on, for half a minute."""
        if len(self._callers) >= _MOST_BELIEVED:
            self._callers.clear()
        self._callers[hash] = (time.monotonic() + BELIEVED_SECONDS, caller)


async def reader(request: Request, ctx: Ctx) -> Caller:
    """Whoever may read."""
    return await _allowed(request, ctx, READ)


async def submitter(request: Request, ctx: Ctx) -> Caller:
    """Whoever may submit, and change what they own."""
    return await _allowed(request, ctx, SUBMIT)


async def admin(request: Request, ctx: Ctx) -> Caller:
    """Whoever may do everything."""
    return await _allowed(request, ctx, ADMIN)


Reader = Annotated[Caller, Depends(reader)]
Submitter = Annotated[Caller, Depends(submitter)]
Admin = Annotated[Caller, Depends(admin)]


async def _allowed(request: Request, ctx: Context, scope: str) -> Caller:
    caller = await find_caller(request, ctx)
    if caller is None:
        check_rate(request, _address(request))
        raise ApiError(
            401,
            "No valid API key was given: send one in the header Authorization, as a Bearer token.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    request.state.key_id = caller.key_id
    check_rate(request, caller.key_id or _address(request))
    if not ctx.keys_needed or "authorization" not in request.headers:
        await check_unsafe(request)
    if scope not in caller.scopes:
        raise ApiError(
            403,
            f"This API key lacks the scope '{scope}'.",
            code="insufficient_scope",
            headers={"www-authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'},
        )
    return caller


async def find_caller(request: Request, ctx: Context) -> Caller | None:
    """Who asks, by the header or else the cookie; None where a key is needed and none is valid."""
    if not ctx.keys_needed:
        return LOCAL
    secret = given_key(request)
    return await caller_of(request, ctx, secret) if secret else None


async def caller_of(request: Request, ctx: Context, secret: str) -> Caller | None:
    """Whose key this is; None if it is nobody's, or was revoked half a minute ago or earlier."""
    believed: Believed = request.app.state.believed
    hash = digest(secret)
    if (caller := believed.get(hash)) is not None:
        return caller
    key = await to_thread.run_sync(_look_up, ctx, hash)
    if key is None:
        return None
    scopes = frozenset().union(*(_IMPLIED[scope] for scope in key.scopes))
    caller = Caller(key.owner, scopes, key.id)
    believed.put(hash, caller)
    return caller


def _look_up(ctx: Context, hash: str) -> Key | None:
    key = find_key(ctx.db, hash)
    if key is not None:
        mark_used(ctx.db, key)
    return key


def given_key(request: Request) -> str | None:
    """The key in the header Authorization, else the one in the session's cookie."""
    header = request.headers.get("authorization")
    if header is not None:
        scheme, _, secret = header.partition(" ")
        return secret.strip() if scheme.lower() == "bearer" else None
    return request.cookies.get(COOKIE)


def sign_in(request: Request, response: Response, secret: str) -> None:
    """Keep a valid key in the browser: no script reads the cookie, no other site sends it."""
    response.set_cookie(
        COOKIE,
        secret,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path="/",
    )


def sign_out(response: Response) -> None:
    """Forget the key in the browser."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")


def _address(request: Request) -> str:
    return request.client.host if request.client else "-"
