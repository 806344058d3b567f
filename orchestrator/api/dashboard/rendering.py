"""Templates to answers, and what goes wrong on the way to a page: sign in, not found, refused.

Knows nothing of what a page shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from orchestrator.api.auth import ADMIN, SUBMIT, Caller
from orchestrator.api.dashboard import shown
from orchestrator.api.dashboard.static import static_url
from orchestrator.api.origins import csrf_token
from orchestrator.api.tags import is_known, tag_of

_FILTERS = (
    *(shown.visible, shown.plain, shown.compact, shown.pretty, shown.number, shown.short),
    *(shown.duration, shown.instant, shown.heat, shown.percent),
)
_TITLES = {
    400: "That was not understood",
    403: "Not with this key",
    404: "Nothing here",
    409: "Not in this state",
    429: "Too many requests",
    503: "Not available now",
}


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("orchestrator.api.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {each.__name__: each for each in _FILTERS}
    made.globals |= {"static_url": static_url, "since": shown.since}
    return made


_templates = _environment()


def page(
    request: Request,
    name: str,
    caller: Caller | None,
    values: Mapping[str, object] | None = None,
    *,
    status: int = 200,
) -> HTMLResponse:
    """The template as a whole page."""
    given = {"csrf_token": csrf_token(request), **(values or {})}
    # Without a referrer at all a browser says `Origin: null` with our own forms.
    headers = {"referrer-policy": "same-origin"}
    return HTMLResponse(_text(request, name, caller, given), status, headers)


def fragment(request: Request, name: str, caller: Caller, values: Mapping[str, object]) -> Response:
    """The template as a part of a page, with an ETag: asked again, 304 while it is the same."""
    text = _text(request, name, caller, values)
    tag = tag_of(text.encode())
    headers = {"etag": tag, "cache-control": "private, no-cache"}
    if is_known(tag, request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    return HTMLResponse(text, headers=headers)


def _text(request: Request, name: str, caller: Caller | None, values: Mapping[str, object]) -> str:
    scopes = caller.scopes if caller else frozenset[str]()
    given = {
        "path": request.url.path,
        "signed_in": caller is not None and caller.key_id is not None,
        "may_change": bool(scopes & {SUBMIT, ADMIN}),
        **values,
    }
    return _templates.get_template(name).render(given)


def problem(request: Request, status: int, message: str) -> Response:
    """The page that says what went wrong; without a key: to the sign in, which leads back."""
    if status == 401:
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/login?next={quote(path, safe='')}", 303)
    title = _TITLES.get(status, "Something went wrong")
    values = {"title": title, "message": message, "status_code": status}
    return page(request, "problem.html", None, values, status=status)
