"""`/api/requests/{id}`: one request, its chunks, and its text as it comes.

Knows nothing of jobs beyond who may see them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import StreamingResponse

from orchestrator.api import told
from orchestrator.api.answers import Chunk, Page, RequestAnswer, Responses
from orchestrator.api.auth import Reader
from orchestrator.api.context import Context, Ctx
from orchestrator.api.limits import check_streams
from orchestrator.api.queries import After, Limit, RequestId, only_known
from orchestrator.api.sse import (
    BEAT,
    DONE,
    SILENT_SECONDS,
    EventStream,
    event,
    with_beats,
)
from orchestrator.db import views
from orchestrator.db.replay import News, envelope
from orchestrator.db.tailing import chunks_page
from orchestrator.errors import NotFound, WorkerError
from orchestrator.follow import ENDED
from orchestrator.spec.chunks import Json, Telling, stream

_RETRY = b"retry: 1000\n\n"
_EVENTS: Responses = {
    200: {
        "description": "A `chat.completion.chunk` an event, then `[DONE]`.",
        "content": {
            "text/event-stream": {
                "schema": {},
                "example": 'id: 1\ndata: {"object":"chat.completion.chunk",...}\n\n'
                "data: [DONE]\n\n",
            }
        },
    }
}
router = APIRouter(
    prefix="/api/requests/{request_id}", tags=["requests"], dependencies=[Depends(only_known)]
)


@router.get("", summary="One request")
def get_request(request_id: RequestId, caller: Reader, ctx: Ctx) -> RequestAnswer:
    """What is asked, and its choices so far, with usage, scores and errors."""
    return told.request_answer(ctx, views.request(ctx.db, request_id, owner=caller.sees))


@router.get("/chunks", summary="A request's chunks after a position")
def list_chunks(
    request_id: RequestId, caller: Reader, ctx: Ctx, after: After = None, limit: Limit = 100
) -> Page[Chunk]:
    """As they are stored, in the order of storing. No `next` yet is not the end: ask its state."""
    views.request(ctx.db, request_id, owner=caller.sees)
    position = -1 if after is None else after
    found = chunks_page(ctx.db, request_id, after=position, limit=limit + 1)
    shown = [told.chunk(stored) for stored in found[:limit]]
    return Page(data=shown, next=shown[-1].position if len(found) > limit else None)


@router.get(
    "/stream",
    summary="A request's text as it comes",
    response_class=StreamingResponse,
    responses=_EVENTS,
    dependencies=[Depends(check_streams)],
)
async def stream_request(
    request_id: RequestId,
    caller: Reader,
    ctx: Ctx,
    last_event_id: Annotated[
        int | None,
        Header(ge=0, lt=2**63, description="The `id` of the last event that is known."),
    ] = None,
    after: Annotated[
        int | None, Query(ge=0, lt=2**63, description="The same, for clients without the header.")
    ] = None,
) -> EventStream:
    """Server-sent events, the same bytes whenever they are read; `id` counts them from 1.

    No time limit: while nothing comes, a comment does every 15 seconds. `[DONE]` is the end; how
    the request ended says the request.
    """
    await run_sync(lambda: views.request(ctx.db, request_id, owner=caller.sees))
    known = last_event_id if last_event_id is not None else after
    return EventStream(_RETRY, _events(ctx, request_id, known or 0), _nothing, {})


async def _events(ctx: Context, request_id: int, known: int) -> AsyncGenerator[bytes, None]:
    """Numbered events, those after `known`; ends early, without `[DONE]`, to be asked for anew."""
    telling: Telling | None = None
    count = 0
    try:
        async with aclosing(with_beats(ctx.tails.follow(request_id), SILENT_SECONDS)) as looks:
            async for look in looks:
                if look is None:
                    yield BEAT
                    continue
                over = look.state in ENDED
                if telling is None and (look.chunks or over):
                    telling = Telling(await run_sync(envelope, ctx.db, request_id))
                said = b""
                for each in _said(telling, look, over) if telling else ():
                    count += 1
                    said += b"id: %d\n%b" % (count, event(each)) if count > known else b""
                if over:
                    said += DONE
                if said:
                    yield said
    except (NotFound, WorkerError):  # it was removed, or the database stays away
        return


def _said(telling: Telling, look: News, over: bool) -> Iterator[Json]:
    """What one look lets be told, as `follow.request_chunks` tells it."""
    for chunk in look.chunks:
        yield from telling.chunk(chunk)
    if not over:
        return
    yield from telling.rest()
    for end in sorted(look.ends, key=lambda end: end.choice):
        yield from telling.end(end)
    if look.state == "succeeded":
        yield from stream(telling.envelope, (), (), look.usage)


async def _nothing() -> None:
    """A reader leaves nothing behind."""
