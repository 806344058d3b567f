"""The pages of requests: a job's, with filters, and one with its messages, choices and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from orchestrator.api.auth import Reader
from orchestrator.api.context import Ctx
from orchestrator.api.dashboard.rendering import fragment, page
from orchestrator.db import asked, views
from orchestrator.errors import ParameterError, RequestError, SpecError
from orchestrator.spec import templates
from orchestrator.spec.chunks import Json, StoredChunk
from orchestrator.spec.plan import given

REQUESTS_A_PAGE = 50
CHOICES_A_PAGE = 8
TOKENS_A_LOOK = 500
MAX_CHOICE = 127
_LIVE = ("queued", "running")
_STATES = ("queued", "running", "succeeded", "failed", "cancelled")

Text = Annotated[str, Query(max_length=200)]
FirstChoice = Annotated[int, Query(alias="choice", ge=0, le=MAX_CHOICE)]

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class ShownMessage:
    """One message: its text, and whatever else it holds."""

    role: str
    name: str | None
    text: str
    rest: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ShownChoice:
    """One choice as it stands; `tokens`: it has some to look at one by one."""

    choice: int
    n_tokens: int
    finish_reason: str | None
    text: str
    scores: Sequence[tuple[str, float]]
    tokens: bool


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token; `top`: text, log-prob and whether it was the one, the likeliest first."""

    text: str
    logprob: float
    top: Sequence[tuple[str, float, bool]]


@router.get("/jobs/{job_given}/requests")
def requests(
    request: Request,
    ctx: Ctx,
    caller: Reader,
    job_given: str,
    state: Text = "",
    finish: Text = "",
    error: Text = "",
    point: Text = "",
    after: Annotated[int, Query(ge=-1, le=2**63 - 1)] = -1,
) -> Response:
    """The job's requests, page by page; `point` may be several positions, apart by commas."""
    job_id = views.find_job(ctx.db, job_given, owner=caller.sees)
    found = views.requests(
        ctx.db,
        job_id,
        states=(state,) if state in _STATES else (),
        finish_reasons=(finish,) if finish else (),
        error_codes=(error,) if error else (),
        points=_positions(point),
        after=after,
        limit=REQUESTS_A_PAGE + 1,
    )
    filters = {"state": state, "finish": finish, "error": error, "point": point}
    values = {
        "job": views.job_status(ctx.db, job_id),
        "requests": found[:REQUESTS_A_PAGE],
        "more": len(found) > REQUESTS_A_PAGE,
        "after": after,
        "filters": {name: value for name, value in filters.items() if value},
    }
    return page(request, "requests.html", caller, values)


def _positions(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise SpecError("point", "positions of points, apart by commas", repr(text))
    return tuple(map(int, parts))


@router.get("/requests/{request_id}")
def one_request(
    request: Request, ctx: Ctx, caller: Reader, request_id: int, first: FirstChoice = 0
) -> Response:
    """One request: what was asked, what came of it, choices side by side."""
    found = views.request(ctx.db, request_id, owner=caller.sees)
    question = asked.asked(ctx.db, request_id)
    params, unreadable = _params(question)
    values = {
        "found": found,
        "job": views.job_status(ctx.db, found.job_id),
        "messages": _messages(params.get("messages")),
        "unreadable": unreadable,
        "point_params": question.point_params,
        "warnings": question.warnings,
        "usage": question.usage,
        "params": {name: value for name, value in params.items() if name != "messages"},
        "columns": {} if question.verbatim else question.columns,
        "choices_a_page": CHOICES_A_PAGE,
    }
    standing = _standing(ctx, found, question, first)
    return page(request, "request.html", caller, values | standing)


@router.get("/requests/{request_id}/choices")
def choices(
    request: Request, ctx: Ctx, caller: Reader, request_id: int, first: FirstChoice = 0
) -> Response:
    """The choices alone, as a part of the page."""
    found = views.request(ctx.db, request_id, owner=caller.sees)
    question = asked.asked(ctx.db, request_id)
    return fragment(request, "_choices.html", caller, _standing(ctx, found, question, first))


@router.get("/requests/{request_id}/state")
def state(request: Request, ctx: Ctx, caller: Reader, request_id: int) -> Response:
    """The state alone, as a part of the page."""
    found = views.request(ctx.db, request_id, owner=caller.sees)
    return fragment(request, "_state.html", caller, {"found": found})


@router.get("/requests/{request_id}/tokens")
def tokens(
    request: Request,
    ctx: Ctx,
    caller: Reader,
    request_id: int,
    choice: Annotated[int, Query(ge=0, le=MAX_CHOICE)] = 0,
    start: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
) -> Response:
    """Some of a choice's tokens, each with what was likely in its place."""
    views.request(ctx.db, request_id, owner=caller.sees)
    found = asked.entries(ctx.db, request_id, choice, start, TOKENS_A_LOOK)
    values = {
        "tokens": [_token(entry) for entry in found],
        "start": start,
        "next": start + TOKENS_A_LOOK if len(found) == TOKENS_A_LOOK else None,
    }
    return fragment(request, "_tokens.html", caller, values)


def _standing(
    ctx: Ctx, found: views.RequestStatus, question: asked.Asked, first: int
) -> dict[str, object]:
    live = found.state in _LIVE
    told = {each.choice: each for each in asked.said(ctx.db, found.id, first=first)}
    logprobs = bool(_written(question).get("logprobs"))
    shown = []
    for choice in range(first, min(found.n, first + CHOICES_A_PAGE)):
        said = told.get(choice) or asked.Said(choice, 0, None, ())
        scores = [(grader, score) for at, grader, score in question.scores if at == choice]
        text = _said(said.chunks, said.finish_reason)
        tokens = logprobs and said.n_tokens > 0
        shown.append(ShownChoice(choice, said.n_tokens, said.finish_reason, text, scores, tokens))
    return {"choices": shown, "live": live, "first": first, "logprobs": logprobs}


def _written(question: asked.Asked) -> dict[str, object]:
    return given(
        question.job_params, question.point_params, question.columns, verbatim=question.verbatim
    )


def _params(question: asked.Asked) -> tuple[dict[str, Any], str | None]:
    """The parameters with their templates filled; as written, and why, where that fails."""
    params = _written(question)
    try:
        for name in () if question.verbatim else templates.TEMPLATED:
            if name in params:
                params[name] = templates.render_tree(params[name], question.columns, (name,))
    except (RequestError, ParameterError, SpecError) as error:
        return params, str(error)
    return params, None


def _messages(raw: object) -> list[ShownMessage]:
    given = raw if isinstance(raw, list | tuple) else ()
    return [_message(each) for each in given if isinstance(each, Mapping)]


def _message(raw: Mapping[str, Any]) -> ShownMessage:
    content = raw.get("content")
    rest = {k: v for k, v in raw.items() if k not in ("role", "name", "content") and v is not None}
    text = content if isinstance(content, str) else ""
    if isinstance(content, list | tuple):
        texts, others = _parts(content)
        text = "\n".join(texts)
        rest |= {"content": others} if others else {}
    name = raw.get("name")
    return ShownMessage(str(raw.get("role")), str(name) if name else None, text, rest)


def _parts(content: Iterable[object]) -> tuple[list[str], list[object]]:
    texts: list[str] = []
    others: list[object] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        else:
            others.append(part)
    return texts, others


def _said(chunks: Iterable[StoredChunk], finish_reason: str | None) -> str:
    """Text, then each call as `name(arguments)`; one that was cut off stays open."""
    pieces: list[str] = []
    calling = False
    for chunk in chunks:
        pieces.append(chunk.text)
        for call in chunk.calls or ():
            if (name := call.get("name")) is not None:
                pieces.append(f"{')' if calling else ''}\n{name}(" if any(pieces) else f"{name}(")
                calling = True
            pieces.append(call["arguments"])
    closed = calling and finish_reason not in (None, "length")
    return "".join(pieces) + (")" if closed else "")


def _token(entry: Json) -> ShownToken:
    top = [
        (other["token"], other["logprob"], other["token"] == entry["token"])
        for other in entry.get("top_logprobs") or ()
    ]
    return ShownToken(entry["token"], entry["logprob"], top)
