"""`POST /v1/chat/completions`: a chat is a job of one request, told from its rows.

It is queued before the jobs of files, streamed as it is persisted or answered whole at its end, and
cancelled when its client leaves before that. Knows nothing of how tokens are made.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from orchestrator import lifecycle
from orchestrator.api.auth import Caller, Submitter
from orchestrator.api.context import Context, Ctx
from orchestrator.api.errors import ApiError
from orchestrator.api.limits import check_streams
from orchestrator.api.openai.asking import Asked, asked
from orchestrator.api.openai.failures import failure
from orchestrator.api.openai.listing import refuse_unknown
from orchestrator.api.openai.shapes import CREATED, asked_for
from orchestrator.api.openai.telling import completion
from orchestrator.api.sse import (
    BEAT,
    DONE,
    SILENT_SECONDS,
    EventStream,
    event,
    unless_left,
    with_beats,
)
from orchestrator.db import stored, views
from orchestrator.db.replay import News, envelope
from orchestrator.db.tables import CHAT, QUEUED, SUCCEEDED
from orchestrator.errors import Conflict, NotFound, ParameterError, WorkerError
from orchestrator.follow import ENDED
from orchestrator.spec.bodies import plan_bodies
from orchestrator.spec.chunks import Json, Telling, stream

NAME = "chat"
LEFT = "its client has left"
log = logging.getLogger("penstock.api")
router = APIRouter(prefix="/v1/chat", tags=["OpenAI: chat"])


@router.post(
    "/completions",
    summary="Answer a chat, streamed or whole",
    responses=CREATED,
    openapi_extra={"requestBody": asked_for()},
)
async def create_completion(request: Request, caller: Submitter, ctx: Ctx) -> Response:
    """Queue the chat before the jobs of files and answer it, with `stream` as it is made.

    When the client leaves before the end, the chat is cancelled. Where no worker serves the model
    now, it waits for one.
    """
    began = time.monotonic()
    raw = await request.body()
    wanted = await run_sync(_asked, ctx, raw)
    if wanted.streamed:
        check_streams(request)
    chat = await run_sync(_submitted, ctx, caller, wanted)
    try:
        if not wanted.streamed:
            whole = await unless_left(request, chat.completion())
            return _gone() if whole is None else JSONResponse(whole, headers=_headers(began))
        events = chat.events()
        first = await unless_left(request, anext(events))
        if first is not None:
            chat.handed_on = True
            return EventStream(first, events, chat.close, _headers(began))
        return _gone()
    finally:
        if not chat.handed_on:
            with anyio.CancelScope(shield=True):
                await chat.close()


def _asked(ctx: Context, raw: bytes) -> Asked:
    settings = ctx.settings
    return asked(
        raw, openai_compatible=settings.openai_compatible, max_choices=settings.max_choices
    )


def _submitted(ctx: Context, caller: Caller, wanted: Asked) -> _Chat:
    refuse_unknown(ctx, wanted.params.model)
    plan = plan_bodies(
        NAME,
        wanted.params.model,
        [(NAME, dict(wanted.body))],
        priority=ctx.settings.chat_priority,
        seed=secrets.randbits(63),
        metadata=wanted.metadata,
    )
    try:
        ctx.check(plan)
    except ParameterError as error:  # without the place: there is but one request
        raise ParameterError(error.message, error.param, error.code) from None
    job_id = lifecycle.submit(ctx.db, plan, ctx.queue, owner=caller.owner, kind=CHAT)
    return _Chat(ctx, job_id, stored.request_of(ctx.db, job_id))


def _headers(began: float) -> dict[str, str]:
    spent = round((time.monotonic() - began) * 1000)
    return {"openai-processing-ms": str(spent), "openai-version": "2020-10-01"}


def _gone() -> Response:
    """For the log alone: nobody is there to read it."""
    return Response(status_code=499)


@dataclass(slots=True)
class _Chat:
    """A submitted chat while its client waits; `over` once it has been seen to have ended.

    `handed_on`: whoever sends the events closes it.
    """

    ctx: Context
    job_id: str
    request_id: int
    over: bool = False
    handed_on: bool = False
    state: str = QUEUED

    async def completion(self) -> Json:
        """The whole `chat.completion`, once there is one. Raises ApiError where there is none."""
        async with aclosing(self._looks()) as looks:
            async for _ in looks:
                pass
        if self.state != SUCCEEDED:
            raise await self._failure()
        return await run_sync(self._folded)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream's bytes, look by look. Raises ApiError where it failed before the first."""
        begun = False
        try:
            async with aclosing(self._told()) as told:
                async for said in told:
                    begun = True
                    yield said
        except ApiError as error:
            if not begun:
                raise
            yield event(error.to_json())

    async def close(self) -> None:
        """Cancel what nobody waits for any more; nothing where it has ended."""
        if not self.over:
            with suppress(Conflict, NotFound, WorkerError):
                await run_sync(lifecycle.cancel, self.ctx.db, self.job_id, LEFT)

    async def _told(self) -> AsyncGenerator[bytes, None]:
        """The same bytes; raises ApiError at the end of whatever did not succeed."""
        told: Telling | None = None
        async with aclosing(with_beats(self._looks(), SILENT_SECONDS)) as looks:
            async for look in looks:
                if look is None:
                    yield BEAT
                elif self.state == SUCCEEDED or (look.chunks and not self.over):
                    if told is None:
                        told = Telling(await run_sync(envelope, self.ctx.db, self.request_id))
                    if said := _said(told, look):
                        yield said
        if self.state != SUCCEEDED:
            raise await self._failure()

    async def _looks(self) -> AsyncGenerator[News, None]:
        looks = self.ctx.tails.follow(self.request_id)
        try:
            async for look in looks:
                self.state, self.over = look.state, look.state in ENDED
                yield look
        except (NotFound, WorkerError) as error:  # removed, or the database stays away
            log.warning("chat.cut_off job=%s error=%s", self.job_id, type(error).__name__)
        finally:
            with anyio.CancelScope(shield=True):
                await looks.aclose()

    async def _failure(self) -> ApiError:
        if not self.over:
            headers = {"retry-after": "1"}
            text = "The server cannot go on with it now."
            return ApiError(503, text, type="server_error", headers=headers)
        return failure(await run_sync(views.request, self.ctx.db, self.request_id))

    def _folded(self) -> Json:
        return completion(next(views.results(self.ctx.db, self.job_id)))


def _said(told: Telling, look: News) -> bytes:
    """What one look lets be told; with the last one of a success, ends, usage and `[DONE]`."""
    chunks = [each for chunk in look.chunks for each in told.chunk(chunk)]
    if look.state != SUCCEEDED:
        return b"".join(map(event, chunks))
    chunks += told.rest()
    for end in sorted(look.ends, key=lambda end: end.choice):
        chunks += told.end(end)
    chunks += stream(told.envelope, (), (), look.usage)
    return b"".join(map(event, chunks)) + DONE
