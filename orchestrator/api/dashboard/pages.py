"""The pages of jobs, workers and schedules. Each shows rows; none changes any.

What a page needs to be read at once is in it; the parts of a big job that take longer (the grid of
its sweep, its errors) are asked for by the page's script. Knows nothing of HTML (`templates/`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from orchestrator.api.auth import Reader
from orchestrator.api.context import Ctx
from orchestrator.api.dashboard import login, requests, static, sweeps
from orchestrator.api.dashboard.rendering import fragment, page
from orchestrator.db import views

JOBS_A_PAGE = 25
SHOWN_REQUESTS = 10
SHOWN_EVENTS = 100
SHOWN_SOURCE = 64 * 1024
STATES = ("queued", "running", "paused", "succeeded", "partial", "failed", "cancelled")
OPEN = ("queued", "running", "paused")
_KINDS = {"": ("job", "batch"), "job": ("job",), "batch": ("batch",), "chat": ("chat",)}

Text = Annotated[str, Query(max_length=200)]

pages = APIRouter(include_in_schema=False)


@pages.get("/")
def jobs(
    request: Request,
    ctx: Ctx,
    caller: Reader,
    state: Text = "",
    model: Text = "",
    name: Text = "",
    user: Text = "",
    since: Text = "",
    kind: Literal["", "job", "batch", "chat"] = "",
    before: Annotated[int | None, Query(ge=0)] = None,
    part: bool = False,
) -> Response:
    """The newest jobs; `part`: their table alone."""
    filters = {"state": state, "model": model, "name": name, "user": user, "kind": kind}
    filters["since"] = since
    found = views.jobs_page(
        ctx.db,
        owner=caller.sees,
        kinds=_KINDS[kind],
        states=(state,) if state in STATES else (),
        model=model or None,
        name=name or None,
        user=user or None,
        since=_day(since),
        before=before,
        limit=JOBS_A_PAGE + 1,
    )
    shown = found[:JOBS_A_PAGE]
    values = {
        "jobs": shown,
        "paces": {job.id: views.pace(ctx.db, job.id) for job in shown if job.state == "running"},
        "filters": {name: value for name, value in filters.items() if value},
        "before": before,
        "next": shown[-1].number if len(found) > JOBS_A_PAGE else None,
        "states": STATES,
    }
    if part:
        return fragment(request, "_jobs.html", caller, values)
    return page(request, "jobs.html", caller, values)


def _day(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone() if text else None
    except ValueError:
        return None


@pages.get("/jobs/{given}")
def job(request: Request, ctx: Ctx, caller: Reader, given: str) -> Response:
    """One job; `given` is its id, its name or the beginning of its id."""
    job_id = views.find_job(ctx.db, given, owner=caller.sees)
    found = views.job(ctx.db, job_id)
    first = views.requests(ctx.db, job_id, limit=SHOWN_REQUESTS + 1)
    values = {
        "spec": found,
        "source": found.source[:SHOWN_SOURCE],
        "cut": len(found.source) > SHOWN_SOURCE,
        "requests": first[:SHOWN_REQUESTS],
        "more": len(first) > SHOWN_REQUESTS,
    }
    return page(request, "job.html", caller, values | _standing(ctx, job_id))


@pages.get("/jobs/{job_id}/status")
def job_status(request: Request, ctx: Ctx, caller: Reader, job_id: str) -> Response:
    """Where the job stands, as a part of its page."""
    job_id = views.find_job(ctx.db, job_id, owner=caller.sees)
    return fragment(request, "_status.html", caller, _standing(ctx, job_id))


def _standing(ctx: Ctx, job_id: str) -> dict[str, object]:
    status = views.job_status(ctx.db, job_id)
    return {
        "job": status,
        "open": status.state in OPEN,
        "cost": _cost(ctx, status),
        "currency": ctx.prices.currency,
        "pace": views.pace(ctx.db, job_id) if status.state == "running" else None,
        "events": views.events(ctx.db, job_id, limit=SHOWN_EVENTS),
    }


def _cost(ctx: Ctx, status: views.JobStatus) -> float | None:
    return ctx.prices.cost(
        status.model, status.prompt_tokens, status.cached_tokens, status.completion_tokens
    )


@pages.get("/workers")
def workers(request: Request, ctx: Ctx, caller: Reader, part: bool = False) -> Response:
    """Who works, and what is queued for each model."""
    values = {"workers": views.workers(ctx.db), "depths": views.queue_depths(ctx.db)}
    if part:
        return fragment(request, "_workers.html", caller, values)
    return page(request, "workers.html", caller, values)


@pages.get("/schedules")
def schedules(request: Request, caller: Reader) -> Response:
    """What runs at set times: nothing does yet, and the page says so."""
    return page(request, "schedules.html", caller)


router = APIRouter()
for _each in (login.router, pages, sweeps.router, requests.router, static.router):
    router.include_router(_each)
