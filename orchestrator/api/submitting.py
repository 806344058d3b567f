"""`POST /api/jobs` and `/api/plan`: a job comes in, or is only looked at.

Knows nothing of how a body becomes a plan (`submitted.py`) or a plan rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Request, Response

from orchestrator import lifecycle, webhooks
from orchestrator.api import told
from orchestrator.api.answers import (
    CONFLICT,
    UNKNOWN_TYPE,
    JobAnswer,
    Object,
    Planned,
    Responses,
)
from orchestrator.api.auth import Caller, Submitter
from orchestrator.api.context import Context, Ctx
from orchestrator.api.errors import ApiError
from orchestrator.api.submitted import JSON_TYPE, YAML_TYPES, planned
from orchestrator.db import store
from orchestrator.jobfile import describe

_PLANS_AT_ONCE = 2

router = APIRouter()
_planning = CapacityLimiter(_PLANS_AT_ONCE)  # so that long plans leave threads to everybody else

_SCHEMA: Object = {
    "type": "object",
    "required": ["name", "params"],
    "description": "A job as docs/jobs.md describes it; `model` here or among the `params`.",
    "properties": {
        "name": {"type": "string", "description": "What it is called."},
        "model": {"type": "string", "description": "The model that it asks."},
        "dataset": {
            "type": "object",
            "description": "`items`: a list of mappings; or `path`: a file under an open folder.",
        },
        "params": {"type": "object", "description": "Chat-completion parameters, `messages`."},
        "sweep": {"type": "object", "description": "Parameter -> the values that it takes."},
        "graders": {"type": "array", "items": {"type": "object"}, "description": "Who scores."},
        "limits": {"type": "object", "description": "What it may cost, until when."},
        "seed": {"type": "integer", "description": "From which requests derive theirs."},
        "priority": {"type": "integer", "description": "The higher, the sooner."},
    },
    "example": {
        "name": "hello",
        "model": "tiny",
        "params": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8},
    },
}
_BODY: Object = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": _SCHEMA} for kind in (JSON_TYPE, *YAML_TYPES[:1])},
    }
}
_SUBMITTED: Responses = {
    200: {"model": JobAnswer, "description": "The job that this Idempotency-Key made before."},
    201: {"model": JobAnswer, "description": "The job; `Location` is where to ask for it."},
    **CONFLICT,
    **UNKNOWN_TYPE,
}


@router.post(
    "/jobs", status_code=201, summary="Submit a job", responses=_SUBMITTED, openapi_extra=_BODY
)
async def submit(
    request: Request,
    caller: Submitter,
    ctx: Ctx,
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[!-~]{1,255}$",
            description="The same key with the same job makes it once; with another: 409.",
        ),
    ] = None,
    webhook_url: Annotated[
        str | None, Header(description="Where to tell that the job has ended; see docs/webhooks.md")
    ] = None,
    webhook_secret: Annotated[
        str | None, Header(description="What that message is signed with; both or neither.")
    ] = None,
) -> Response:
    """Plan the job in the body, YAML or JSON with the same keys, and queue it."""
    body, kind = await request.body(), request.headers.get("content-type")
    webhook = await run_sync(_webhook, ctx, webhook_url, webhook_secret)
    args = (ctx, caller, body, kind, idempotency_key, webhook)
    job_id, is_new = await run_sync(_submitted, *args, limiter=_planning)
    answer = await run_sync(told.job_answer, ctx, job_id)
    headers = {"location": f"/api/jobs/{job_id}"}
    return told.as_json(answer, headers, 201 if is_new else 200)


@router.post(
    "/plan",
    summary="Say what a job would run",
    response_model=Planned,
    responses=UNKNOWN_TYPE,
    openapi_extra=_BODY,
)
async def make_plan(request: Request, caller: Submitter, ctx: Ctx) -> Planned:
    """As `penstock plan` does: nothing is written."""
    body, kind = await request.body(), request.headers.get("content-type")
    return await run_sync(_described, ctx, body, kind, limiter=_planning)


def _described(ctx: Context, body: bytes, kind: str | None) -> Planned:
    plan = planned(body, kind, ctx.settings)
    ctx.check(plan)
    return Planned.model_validate(describe(plan, context=None))


def _submitted(
    ctx: Context,
    caller: Caller,
    body: bytes,
    kind: str | None,
    key: str | None,
    webhook: Mapping[str, object] | None,
) -> tuple[str, bool]:
    """The job's id, and whether it is a new one."""
    plan = planned(body, kind, ctx.settings)
    ctx.check(plan)
    before = None if key is None else store.submitted(ctx.db, caller.owner, key)
    job_id = lifecycle.submit(
        ctx.db,
        plan,
        ctx.queue,
        owner=caller.owner,
        idempotency_key=key,
        webhook=webhook,
    )
    return job_id, before is None


def _webhook(ctx: Context, url: str | None, secret: str | None) -> Mapping[str, object] | None:
    if url is None and secret is None:
        return None
    if url is None or secret is None:
        missing = "Webhook-Url" if url is None else "Webhook-Secret"
        message = "Webhook-Url and Webhook-Secret belong together."
        raise ApiError(400, message, param=missing, code="missing_required_parameter")
    webhooks.check_secret(secret)
    webhooks.check_target(url, ctx.settings)
    return {"url": url, "secret": secret}
