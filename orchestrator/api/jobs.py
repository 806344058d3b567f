"""`/api/jobs`: what there is, where it stands, steering it; with `submitting.py` and `parts.py`.

What the caller may not see does not exist for them. Knows nothing of how a job is planned or run.
"""

from __future__ import annotations

from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Response

from orchestrator import lifecycle
from orchestrator.api import parts, submitting, told
from orchestrator.api.answers import (
    CONFLICT,
    JobAnswer,
    JobKind,
    JobLine,
    JobState,
    Page,
    Reason,
    Retried,
)
from orchestrator.api.auth import Reader, Submitter
from orchestrator.api.context import Ctx
from orchestrator.api.queries import After, Instant, JobId, Limit, found_job, only_known
from orchestrator.db import views

LONGEST_WAIT_SECONDS = 120

router = APIRouter(prefix="/api", tags=["jobs"], dependencies=[Depends(only_known)])
router.include_router(submitting.router)


@router.get("/jobs", summary="Jobs, the newest first", response_model=Page[JobLine])
def list_jobs(
    caller: Reader,
    ctx: Ctx,
    state: Annotated[list[JobState], Query(description="In one of these states.")] = [],  # noqa: B006
    kind: Annotated[list[JobKind], Query(description="Of one of these kinds.")] = ["job"],  # noqa: B006
    model: Annotated[str | None, Query(description="Of this model.")] = None,
    name: Annotated[str | None, Query(description="Of this name.")] = None,
    user: Annotated[
        str | None, Query(description="With a request whose parameter `user` is this.")
    ] = None,
    since: Annotated[Instant | None, Query(description="Submitted then or later.")] = None,
    until: Annotated[Instant | None, Query(description="Submitted before.")] = None,
    after: After = None,
    limit: Limit = 20,
) -> Page[JobLine]:
    """Jobs that the caller may see."""
    found = views.jobs_page(
        ctx.db,
        owner=caller.sees,
        kinds=kind,
        states=state,
        model=model,
        name=name,
        user=user,
        since=since,
        until=until,
        before=after,
        limit=limit + 1,
    )
    shown = [told.job_line(ctx, status) for status in found[:limit]]
    return Page(data=shown, next=shown[-1].number if len(found) > limit else None)


@router.get(
    "/jobs/{job}",
    summary="Where a job stands",
    response_model=JobAnswer,
    responses=CONFLICT,
)
async def get_job(
    job: JobId,
    caller: Reader,
    ctx: Ctx,
    wait: Annotated[
        int | None,
        Query(
            ge=0,
            le=LONGEST_WAIT_SECONDS,
            description="Answer once the version is another, or after so many seconds.",
        ),
    ] = None,
    version: Annotated[
        str | None, Query(max_length=64, description="Another than this; by default than now's.")
    ] = None,
) -> Response:
    """State, counts, pace, time left, tokens, cost, and why it waits if it does."""
    job_id = await run_sync(found_job, ctx, caller, job)
    if wait is not None:
        if version is None:
            version = await run_sync(views.version, ctx.db, job_id)
        await ctx.tails.changed(job_id, version, wait)
    return told.as_json(await run_sync(told.job_answer, ctx, job_id), {})


@router.post(
    "/jobs/{job}/cancel", summary="Cancel a job", response_model=JobAnswer, responses=CONFLICT
)
def cancel(job: JobId, caller: Submitter, ctx: Ctx, why: Reason | None = None) -> JobAnswer:
    """What is queued ends now; what runs, within a second, its text kept."""
    job_id = found_job(ctx, caller, job)
    lifecycle.cancel(ctx.db, job_id, why.reason if why else None)
    return told.job_answer(ctx, job_id)


@router.post(
    "/jobs/{job}/pause", summary="Pause a job", response_model=JobAnswer, responses=CONFLICT
)
def pause(job: JobId, caller: Submitter, ctx: Ctx) -> JobAnswer:
    """Nothing more is claimed; what runs comes back within a second, its tokens kept."""
    job_id = found_job(ctx, caller, job)
    lifecycle.pause(ctx.db, job_id)
    return told.job_answer(ctx, job_id)


@router.post(
    "/jobs/{job}/resume", summary="Resume a job", response_model=JobAnswer, responses=CONFLICT
)
def resume(job: JobId, caller: Submitter, ctx: Ctx) -> JobAnswer:
    """Lift the pause."""
    job_id = found_job(ctx, caller, job)
    lifecycle.resume(ctx.db, job_id, ctx.queue)
    return told.job_answer(ctx, job_id)


@router.post(
    "/jobs/{job}/retry",
    summary="Try a job's failed requests again",
    response_model=Retried,
    responses=CONFLICT,
)
def retry(job: JobId, caller: Submitter, ctx: Ctx) -> Retried:
    """Those that failed and no others; what they have generated is kept."""
    job_id = found_job(ctx, caller, job)
    count = lifecycle.retry(ctx.db, job_id, ctx.queue)
    return Retried(retried=count, job=told.job_answer(ctx, job_id))


router.include_router(parts.router)
