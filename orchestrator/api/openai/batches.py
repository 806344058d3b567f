"""`/v1/batches`: a file of chat completions, run as one job, ended in files.

Beside the routes a thread takes every batch from step to step (`orchestrator.batches`), for as
long as the application runs.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Annotated, Any, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from orchestrator import files, lifecycle
from orchestrator.api.auth import Reader, Submitter
from orchestrator.api.context import Context, Ctx
from orchestrator.api.openai.files import LEAST_SECONDS, MOST_SECONDS
from orchestrator.batches import REASON, Batches, BatchThread
from orchestrator.db import batches as rows
from orchestrator.db import views
from orchestrator.errors import Conflict, NotFound

WINDOW = r"^([1-9][0-9]{0,3}[sm]|[1-9][0-9]{0,2}h|[1-9]d|[12][0-9]d|30d)$"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_ID = re.compile(r"batch_[A-Za-z0-9]{24}")
_ENDED: dict[int | str, dict[str, Any]] = {409: {"description": "It has ended already."}}
_TIMES = (
    *("in_progress_at", "expires_at", "finalizing_at", "completed_at"),
    *("failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)


@asynccontextmanager
async def _looked_after(app: FastAPI) -> AsyncIterator[None]:
    ctx: Context = app.state.context
    thread = BatchThread(Batches(ctx.settings, ctx.db, ctx.queue, ctx.models, ctx.check))
    app.state.batches = thread
    thread.start()
    try:
        yield
    finally:
        await run_sync(thread.stop)


router = APIRouter(prefix="/v1/batches", tags=["OpenAI: files and batches"], lifespan=_looked_after)

BatchId = Annotated[str, Path(description="The batch's id, `batch_...`.")]
Key = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class ExpiresAfter(BaseModel):
    """How long the files stay that the batch ends in."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"] = Field(description="From when on: the file's making.")
    seconds: int = Field(ge=LEAST_SECONDS, le=MOST_SECONDS, description="How long.")


class NewBatch(BaseModel):
    """The batch to make."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str = Field(description="The file of lines, uploaded with the purpose `batch`.")
    endpoint: Literal["/v1/chat/completions"] = Field(description="The url of every line.")
    completion_window: str = Field(
        pattern=WINDOW,
        description="What has not ended by then is not run any more: `24h`, or another whole "
        "number of seconds, minutes, hours or days, such as `90m`.",
    )
    metadata: dict[Key, Value] | None = Field(
        default=None, max_length=16, description="Words of your own, kept with the batch."
    )
    output_expires_after: ExpiresAfter | None = Field(
        default=None, description="For the files it ends in; they stay where this is not given."
    )


class BatchError(BaseModel):
    """What is wrong with the input file."""

    code: str | None = Field(description="A word for programs, such as `invalid_json_line`.")
    message: str | None = Field(description="What is wrong, for people.")
    param: str | None = Field(description="The key it is about, such as `body.temperature`.")
    line: int | None = Field(description="The line from 1; null: the whole file.")


class BatchErrors(BaseModel):
    """What validation found; up to 100."""

    object: Literal["list"] = Field(default="list", description="Always `list`.")
    data: list[BatchError] = Field(description="In the order of the lines.")


class RequestCounts(BaseModel):
    """The batch's requests; those cancelled or expired are neither completed nor failed."""

    total: int = Field(description="All; 0 until the file is validated.")
    completed: int = Field(description="Those that succeeded.")
    failed: int = Field(description="Those that failed.")


class InputDetails(BaseModel):
    """Of the prompts' tokens."""

    cached_tokens: int = Field(description="Those whose KV was there already.")


class OutputDetails(BaseModel):
    """Of the completions' tokens."""

    reasoning_tokens: int = Field(description="Always 0.")


class BatchUsage(BaseModel):
    """Tokens so far."""

    input_tokens: int = Field(description="Of all prompts, once each.")
    input_tokens_details: InputDetails = Field(description="Of these.")
    output_tokens: int = Field(description="Of all choices.")
    output_tokens_details: OutputDetails = Field(description="Of these.")
    total_tokens: int = Field(description="Both.")


class BatchObject(BaseModel):
    """One batch. All times are Unix seconds, null until then."""

    id: str = Field(description="`batch_` and 24 letters and digits.")
    object: Literal["batch"] = Field(default="batch", description="Always `batch`.")
    endpoint: str = Field(description="The url of every line.")
    model: str | None = Field(description="The model of every line; null until validated.")
    errors: BatchErrors | None = Field(description="Why it failed; null if it has not.")
    input_file_id: str = Field(description="The file of lines.")
    completion_window: str = Field(description="As it was asked for.")
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ] = Field(description="Where it stands.")
    output_file_id: str | None = Field(description="The completions, once it has ended.")
    error_file_id: str | None = Field(description="All else, once it has ended.")
    created_at: int = Field(description="When it was made.")
    in_progress_at: int | None = Field(description="When its requests were queued.")
    expires_at: int | None = Field(description="When what has not ended is given up.")
    finalizing_at: int | None = Field(description="When the writing of its files began.")
    completed_at: int | None = Field(description="When it was completed.")
    failed_at: int | None = Field(description="When it was found wrong.")
    expired_at: int | None = Field(description="When it ended with its time.")
    cancelling_at: int | None = Field(description="When somebody asked to cancel it.")
    cancelled_at: int | None = Field(description="When it was cancelled.")
    request_counts: RequestCounts = Field(description="How far it is, true while it runs.")
    usage: BatchUsage | None = Field(description="Tokens so far; null until it runs.")
    metadata: dict[str, str] | None = Field(description="As it was given.")


class BatchList(BaseModel):
    """A page of batches."""

    object: Literal["list"] = Field(default="list", description="Always `list`.")
    data: list[BatchObject] = Field(description="The newest first.")
    first_id: str | None = Field(description="The id of the first, null if there is none.")
    last_id: str | None = Field(description="The id of the last; `after` for the next page.")
    has_more: bool = Field(description="Whether others come after these.")


@router.post("", summary="Run a file of requests")
def create_batch(body: NewBatch, request: Request, caller: Submitter, ctx: Ctx) -> BatchObject:
    """Take the batch; its lines are validated next, and run once all of them are right."""
    if not files.FILE_ID.fullmatch(body.input_file_id):
        raise NotFound("file", body.input_file_id)
    window, kept = body.completion_window, body.output_expires_after
    new = rows.NewBatch(
        files.new_id("batch_"),
        caller.owner,
        body.endpoint,
        body.input_file_id,
        window,
        int(window[:-1]) * _UNITS[window[-1]],
        None if kept is None else kept.seconds,
        body.metadata,
    )
    made = rows.insert_batch(ctx.db, new, sees=caller.sees)
    _nudge(request)
    return _told(ctx, made)


@router.get("", summary="Batches")
def list_batches(
    caller: Reader,
    ctx: Ctx,
    after: Annotated[str | None, Query(description="The id after which the page begins.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="How many at most.")] = 20,
) -> BatchList:
    """Batches, the newest first."""
    after = None if after is None else _known(after)
    found = rows.batches_page(ctx.db, owner=caller.sees, after=after, limit=limit + 1)
    shown = [_told(ctx, each) for each in found[:limit]]
    return BatchList(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > limit,
    )


@router.get("/{batch_id}", summary="One batch")
def get_batch(batch_id: BatchId, caller: Reader, ctx: Ctx) -> BatchObject:
    """Where the batch stands; its counts and tokens are true while it runs."""
    return _told(ctx, rows.batch(ctx.db, _known(batch_id), owner=caller.sees))


@router.post("/{batch_id}/cancel", summary="Cancel a batch", responses=_ENDED)
def cancel_batch(batch_id: BatchId, request: Request, caller: Submitter, ctx: Ctx) -> BatchObject:
    """Run no more of it. What is complete by then stands in the output file, once it is
    `cancelled`. Refused when it has ended."""
    batch = rows.cancel_batch(ctx.db, _known(batch_id), owner=caller.sees)
    if batch.job_id is not None:
        with suppress(Conflict, NotFound):  # all of it has ended meanwhile
            lifecycle.cancel(ctx.db, batch.job_id, REASON)
    _nudge(request)
    return _told(ctx, batch)


def _known(batch_id: str) -> str:
    """Raises NotFound for what is no batch's id, which no database need be asked for."""
    if not _ID.fullmatch(batch_id):
        raise NotFound("batch", batch_id)
    return batch_id


def _nudge(request: Request) -> None:
    thread: BatchThread | None = getattr(request.app.state, "batches", None)
    if thread is not None:
        thread.nudge()


def _told(ctx: Context, batch: rows.Batch) -> BatchObject:
    known = None
    if batch.job_id is not None:
        with suppress(NotFound):
            known = views.job_status(ctx.db, batch.job_id)
    return BatchObject.model_validate(
        {
            "id": batch.id,
            "endpoint": batch.endpoint,
            "model": batch.model,
            "errors": None if batch.errors is None else {"data": list(batch.errors)},
            "input_file_id": batch.input_file_id,
            "completion_window": batch.completion_window,
            "status": batch.status,
            "output_file_id": batch.output_file_id,
            "error_file_id": batch.error_file_id,
            "created_at": int(batch.created_at.timestamp()),
            **{name: _unix(getattr(batch, name)) for name in _TIMES},
            "request_counts": {
                "total": batch.lines,
                "completed": known.succeeded if known else 0,
                "failed": known.failed if known else 0,
            },
            "usage": None if known is None else _usage(known),
            "metadata": None if batch.details is None else dict(batch.details),
        }
    )


def _usage(job: views.JobStatus) -> Mapping[str, object]:
    return {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": job.cached_tokens},
        "output_tokens": job.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt_tokens + job.completion_tokens,
    }


def _unix(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
