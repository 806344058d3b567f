"""Chunks as server-sent events, for both doors: one event a chunk, then `[DONE]`.

Knows how events are written and when the client has left; nothing of what is asked or of rows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TypeVar

import anyio
from fastapi.responses import StreamingResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

SILENT_SECONDS = 15.0
"""After so long without news a comment goes out, so that nobody on the way gives up."""

DONE = b"data: [DONE]\n\n"
BEAT = b": still here\n\n"
Look = TypeVar("Look")
Done = TypeVar("Done")


def event(data: Mapping[str, object]) -> bytes:
    """One event: compact JSON. All in ASCII: some readers end a line at U+2028 too."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class EventStream(StreamingResponse):
    """Events as they come; `closed` is called once at the end, also when the client has left."""

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        closed: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
    ) -> None:
        kept = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(_all(first, events), headers=kept, media_type="text/event-stream")
        self._events, self._closed = events, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Where it was left in the middle of an event nobody would close it but the collector.
            with anyio.CancelScope(shield=True):
                try:
                    await self._events.aclose()
                finally:
                    await self._closed()


async def _all(first: bytes, others: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for each in others:
        yield each


async def with_beats(
    looks: AsyncIterator[Look], seconds: float
) -> AsyncGenerator[Look | None, None]:
    """The looks, and None whenever for so many seconds there was none."""
    waiting: asyncio.Task[Look | None] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(_next(looks))
            await asyncio.wait({waiting}, timeout=seconds)
            if not waiting.done():
                yield None
                continue
            look, waiting = waiting.result(), None
            if look is None:
                return
            yield look
    finally:
        with anyio.CancelScope(shield=True):
            if waiting is not None:
                waiting.cancel()
                with suppress(asyncio.CancelledError):
                    await waiting
            if isinstance(looks, AsyncGenerator):
                await looks.aclose()


async def _next(looks: AsyncIterator[Look]) -> Look | None:
    return await anext(looks, None)


async def unless_left(request: Request, wanted: Awaitable[Done]) -> Done | None:
    """What `wanted` comes to, or raises; None when the client has left before."""
    work = asyncio.ensure_future(wanted)
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        left.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(work, left, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
