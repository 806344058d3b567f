"""`/v1/chat/completions` read: completions that are whole, by id, page by page; removed.

Every chat is stored, and what is told of it here is folded from its rows each time.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse

from orchestrator.api.auth import Reader, Submitter
from orchestrator.api.context import Context, Ctx
from orchestrator.api.errors import ApiError
from orchestrator.api.openai.shapes import DELETED, LISTED, MESSAGES, ONE
from orchestrator.api.openai.telling import completion
from orchestrator.db import stored, views
from orchestrator.db.results import Result
from orchestrator.errors import NotFound
from orchestrator.spec.bodies import METADATA
from orchestrator.spec.chunks import Json

router = APIRouter(prefix="/v1/chat/completions", tags=["OpenAI: chat"])

CompletionId = Annotated[str, Path(description="The completion's id, `chatcmpl-...`.")]
After = Annotated[str | None, Query(description="The id after which the page begins.")]
Limit = Annotated[int, Query(ge=1, le=100, description="How many at most.")]
Order = Annotated[Literal["asc", "desc"], Query(description="`asc`: the oldest first.")]
ModelFilter = Annotated[str | None, Query(description="Those of this model alone.")]
_PAIR = re.compile(r'metadata\[([^]"\\\0]{1,64})\]')
_METADATA: dict[str, Any] = {
    "name": METADATA,
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "`metadata[KEY]=VALUE`: those with this pair among theirs.",
    "schema": {"type": "object"},  # whatever stands in a query is text
}


@router.get(
    "",
    summary="Stored completions",
    responses=LISTED,
    openapi_extra={"parameters": [_METADATA]},
)
def list_completions(
    request: Request,
    caller: Reader,
    ctx: Ctx,
    model: ModelFilter = None,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> JSONResponse:
    """Completions that are whole, in the order in which they were asked for."""
    found = stored.chats_page(
        ctx.db,
        owner=caller.sees,
        model=model,
        metadata=_pairs(request),
        after=after,
        newest_first=order == "desc",
        limit=limit + 1,
    )
    shown = [completion(_result(ctx, job_id)) for job_id in found[:limit]]
    return JSONResponse(_page(shown, has_more=len(found) > limit))


def _pairs(request: Request) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if found := _PAIR.fullmatch(name):
            pairs[found[1]] = value
        if name.startswith(METADATA) and (not found or "\0" in value):
            message = (
                f"Invalid '{METADATA}': expected metadata[KEY]=VALUE, a KEY of 1 to 64 characters "
                "without quotes, brackets or backslashes."
            )
            raise ApiError(400, message, param=METADATA, code="invalid_value")
    return pairs


@router.get("/{completion_id}", summary="One stored completion", responses=ONE)
def get_completion(completion_id: CompletionId, caller: Reader, ctx: Ctx) -> JSONResponse:
    """The completion as it was answered. One that is still being made does not exist yet."""
    return JSONResponse(completion(_found(ctx, caller.sees, completion_id)))


@router.delete("/{completion_id}", summary="Remove a stored completion", responses=DELETED)
def delete_completion(completion_id: CompletionId, caller: Submitter, ctx: Ctx) -> JSONResponse:
    """Remove the chat, its messages and all that was stored of it, for good."""
    stored.delete_chat(ctx.db, completion_id, owner=caller.sees)
    gone = {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}
    return JSONResponse(gone)


@router.get(
    "/{completion_id}/messages", summary="What a stored completion answers", responses=MESSAGES
)
def list_messages(
    completion_id: CompletionId,
    caller: Reader,
    ctx: Ctx,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> JSONResponse:
    """The messages that the chat was asked with."""
    given: Any = _found(ctx, caller.sees, completion_id).columns["messages"]
    told = [_message(f"{completion_id}-{place}", each) for place, each in enumerate(given)]
    if order == "desc":
        told.reverse()
    if after is not None:
        places = [place for place, each in enumerate(told) if each["id"] == after]
        if not places:
            raise NotFound("message", after)
        told = told[places[0] + 1 :]
    return JSONResponse(_page(told[:limit], has_more=len(told) > limit))


def _found(ctx: Context, owner: str | None, completion_id: str) -> Result:
    return _result(ctx, stored.find_chat(ctx.db, completion_id, owner=owner))


def _result(ctx: Context, job_id: str) -> Result:
    for result in views.results(ctx.db, job_id):
        return result
    raise NotFound(stored.KIND, job_id)  # removed since it was found


def _page(data: list[Json], *, has_more: bool) -> Json:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def _message(id: str, given: Json) -> Json:
    """The message as it was asked; of parts, `content` is their text and `content_parts` they."""
    content, parts = given.get("content"), None
    if isinstance(content, list):
        parts = content
        content = "".join(part.get("text", "") for part in parts)
    return {"name": None, **given, "id": id, "content": content, "content_parts": parts}
