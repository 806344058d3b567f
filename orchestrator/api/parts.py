"""`/api/jobs/{job}/...`: points, requests, errors, events and source of one job.

Page by page, whatever the job's size. Knows nothing of how a job is steered.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from orchestrator.api import results, told
from orchestrator.api.answers import (
    CONFLICT,
    All,
    ErrorLine,
    EventLine,
    FinishReason,
    Page,
    Point,
    RequestLine,
    RequestState,
    Responses,
)
from orchestrator.api.auth import Reader
from orchestrator.api.context import Ctx
from orchestrator.api.queries import After, JobId, Limit, found_job
from orchestrator.db import views

_YAML: Responses = {
    200: {
        "description": "The file, word for word; empty for what came through `/v1`.",
        "content": {"application/yaml": {"schema": {}}},
    }
}
PointPosition = Annotated[int, Query(ge=0, lt=2**31)]

router = APIRouter(prefix="/jobs/{job}", responses=CONFLICT)


@router.get("/points", summary="A job's points")
def list_points(
    job: JobId, caller: Reader, ctx: Ctx, after: After = None, limit: Limit = 100
) -> Page[Point]:
    """Each cell of the sweep with its requests, tokens and scores."""
    job_id = found_job(ctx, caller, job)
    after = -1 if after is None else after
    found = views.points_page(ctx.db, job_id, after=after, limit=limit + 1)
    shown = [told.point(totals) for totals in found[:limit]]
    return Page(data=shown, next=shown[-1].position if len(found) > limit else None)


@router.get("/requests", summary="A job's requests")
def list_requests(
    job: JobId,
    caller: Reader,
    ctx: Ctx,
    state: Annotated[list[RequestState], Query(description="In one of these states.")] = [],  # noqa: B006
    finish_reason: Annotated[
        list[FinishReason], Query(description="With a choice that ended so.")
    ] = [],  # noqa: B006
    error_code: Annotated[list[str], Query(description="With one of these errors.")] = [],  # noqa: B006
    point: Annotated[list[PointPosition], Query(description="At one of these points.")] = [],  # noqa: B006
    after: After = None,
    limit: Limit = 100,
) -> Page[RequestLine]:
    """In the order of the plan."""
    job_id = found_job(ctx, caller, job)
    found = views.requests(
        ctx.db,
        job_id,
        states=state,
        finish_reasons=finish_reason,
        error_codes=error_code,
        points=point,
        after=-1 if after is None else after,
        limit=limit + 1,
    )
    shown = [told.request_line(status) for status in found[:limit]]
    return Page(data=shown, next=shown[-1].id if len(found) > limit else None)


@router.get("/errors", summary="A job's errors, by class")
def list_errors(job: JobId, caller: Reader, ctx: Ctx) -> All[ErrorLine]:
    """Each code with how many requests have it, and one of them."""
    found = views.errors(ctx.db, found_job(ctx, caller, job))
    return All(data=[ErrorLine.model_validate(group) for group in found])


@router.get("/events", summary="What happened to a job")
def list_events(
    job: JobId, caller: Reader, ctx: Ctx, after: After = None, limit: Limit = 100
) -> Page[EventLine]:
    """The oldest first."""
    job_id = found_job(ctx, caller, job)
    found = views.events(ctx.db, job_id, after=after or 0, limit=limit + 1)
    shown = [EventLine.model_validate(event) for event in found[:limit]]
    return Page(data=shown, next=shown[-1].id if len(found) > limit else None)


@router.get("/source", summary="A job's file", response_class=Response, responses=_YAML)
def get_source(job: JobId, caller: Reader, ctx: Ctx) -> Response:
    """The YAML that was submitted."""
    source = views.job(ctx.db, found_job(ctx, caller, job)).source
    return Response(source, media_type="application/yaml")


router.include_router(results.router)
