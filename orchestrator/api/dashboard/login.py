"""Signing in: the page that takes an API key and keeps it in a cookie no script can read."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import RedirectResponse

from orchestrator.api.auth import caller_of, find_caller, sign_in, sign_out
from orchestrator.api.context import Ctx
from orchestrator.api.dashboard.rendering import page
from orchestrator.api.limits import check_rate
from orchestrator.api.origins import CheckedForm

router = APIRouter(include_in_schema=False)


@router.get("/login")
async def login(
    request: Request, ctx: Ctx, next: Annotated[str, Query(max_length=2000)] = "/"
) -> Response:
    """The form; whoever is known already goes on at once."""
    if await find_caller(request, ctx) is not None:
        return RedirectResponse(_ours(next), 303)
    return page(request, "login.html", None, {"next": _ours(next), "refused": False})


@router.post("/login")
async def enter(
    request: Request,
    ctx: Ctx,
    form: CheckedForm,
    key: Annotated[str, Form(max_length=200)],
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """Take a key: on to the page that was wanted, or the form again."""
    check_rate(request, request.client.host if request.client else "-")
    if not ctx.keys_needed or await caller_of(request, ctx, key.strip()) is None:
        values = {"next": _ours(next), "refused": True}
        return page(request, "login.html", None, values, status=403)
    answer = RedirectResponse(_ours(next), 303)
    sign_in(request, answer, key.strip())
    return answer


@router.post("/logout")
async def leave(form: CheckedForm) -> Response:
    """Forget the key in this browser."""
    answer = RedirectResponse("/login", 303)
    sign_out(answer)
    return answer


def _ours(path: str) -> str:
    """The path if it is one of this server; `//host` and `/\\\\host` are not."""
    parts = urlsplit(path)
    clean = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if clean and not parts.scheme and not parts.netloc else "/"
