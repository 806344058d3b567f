"""`/api/jobs/{job}/results`: what has ended, as JSON Lines, in the order of ending.

Knows nothing of how that order is found (`db/finished.py`), nor of what a line says (`export.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from io import StringIO
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from orchestrator.api.answers import Responses
from orchestrator.api.auth import Reader
from orchestrator.api.context import Context, Ctx
from orchestrator.api.limits import check_streams
from orchestrator.api.queries import JobId, found_job
from orchestrator.api.waits import Stopped
from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.db.finished import Place, pages, place_of
from orchestrator.db.leftovers import has_ended
from orchestrator.export import export

LOOK_SECONDS = 2.0
"""How soon at the latest it looks again: what ended just now may be told a moment later only."""

_LINES_AT_ONCE = 10
_LINES: Responses = {
    200: {
        "description": "A request a line, as `penstock export` writes it.",
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
    },
}

router = APIRouter()


@router.get(
    "/results",
    summary="A job's results so far, or up to its end",
    response_class=StreamingResponse,
    responses=_LINES,
    dependencies=[Depends(check_streams)],
)
async def get_results(
    job: JobId,
    caller: Reader,
    ctx: Ctx,
    after: Annotated[
        int | None,
        Query(ge=0, lt=2**63, description="`request_id` of the last line that is known."),
    ] = None,
    follow: Annotated[
        bool, Query(description="Go on until every request of the job has ended.")
    ] = False,
) -> StreamingResponse:
    """What has ended by now, in the order of ending: a line of JSON a request.

    Go on later with `after`; a request that is tried again comes again when it has ended again.
    With `follow` the answer ends when the job has; one that is cut off before breaks.
    """
    job_id = await run_sync(found_job, ctx, caller, job)
    last = await run_sync(place_of, ctx.db, job_id, after)  # refused before the answer begins
    lines = _until_ended(ctx, job_id, last, follow=follow)
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _until_ended(
    ctx: Context, job_id: str, last: Place | None, *, follow: bool
) -> AsyncIterator[str]:
    """Raises Stopped when the server stops before: who reads must not take that for the end."""
    while True:
        version = await run_sync(views.version, ctx.db, job_id)  # first: later changes wake us
        over = await run_sync(has_ended, ctx.db, job_id)
        lines = _lines(ctx.db, job_id, last, over)
        async for text, last in iterate_in_threadpool(lines):  # noqa: B007
            yield text
        if over or not follow:
            return
        await ctx.tails.changed(job_id, version, LOOK_SECONDS)
        if ctx.tails.closed:
            raise Stopped


def _lines(
    db: Database, job_id: str, last: Place | None, over: bool
) -> Iterator[tuple[str, Place]]:
    """Some lines at a time, and the place behind their page."""
    for results, place in pages(db, job_id, last, over=over):
        for start in range(0, len(results), _LINES_AT_ONCE):
            out = StringIO()
            export(results[start : start + _LINES_AT_ONCE], out, lambda count: None)
            yield out.getvalue(), place
