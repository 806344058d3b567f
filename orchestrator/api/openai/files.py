"""`/v1/files`: what batches read and write; uploaded to disk, streamed from there."""

from __future__ import annotations

from typing import Annotated, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from orchestrator import files
from orchestrator.api.auth import Reader, Submitter
from orchestrator.api.context import Ctx
from orchestrator.api.errors import ApiError
from orchestrator.api.openai.upload import upload
from orchestrator.db import files as rows
from orchestrator.errors import NotFound, PenstockError

router = APIRouter(prefix="/v1/files", tags=["OpenAI: files and batches"])

LEAST_SECONDS, MOST_SECONDS = 3600, 2_592_000
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FORM = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSON Lines, see batches."},
        "purpose": {"type": "string", "enum": [rows.INPUT], "description": "What it is for."},
        _ANCHOR: {
            "type": "string",
            "enum": ["created_at"],
            "description": "From when on the seconds count; only with the seconds.",
        },
        _SECONDS: {
            "type": "integer",
            "minimum": LEAST_SECONDS,
            "maximum": MOST_SECONDS,
            "description": "How long the file stays; for ever where this is not given.",
        },
    },
    "required": ["file", "purpose"],
    "dependentRequired": {_ANCHOR: [_SECONDS], _SECONDS: [_ANCHOR]},
    "additionalProperties": False,
}

FileId = Annotated[str, Path(description="The file's id, `file-...`.")]


class FileObject(BaseModel):
    """One file."""

    id: str = Field(description="`file-` and 24 letters and digits.")
    object: Literal["file"] = Field(default="file", description="Always `file`.")
    bytes: int = Field(description="Its length.")
    created_at: int = Field(description="When it was made, in Unix seconds.")
    expires_at: int | None = Field(default=None, description="When it goes; absent: it stays.")
    filename: str = Field(description="The name that it was uploaded with; for people alone.")
    purpose: Literal["batch", "batch_output"] = Field(
        description="`batch`: lines to run; `batch_output`: what came of them."
    )
    status: Literal["processed"] = Field(
        default="processed", description="Deprecated; always this."
    )


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = Field(default="list", description="Always `list`.")
    data: list[FileObject] = Field(description="The files.")
    first_id: str | None = Field(description="The id of the first, null if there is none.")
    last_id: str | None = Field(description="The id of the last; `after` for the next page.")
    has_more: bool = Field(description="Whether others come after these.")


class FileDeleted(BaseModel):
    """What was removed."""

    id: str = Field(description="The file's id.")
    object: Literal["file"] = Field(default="file", description="Always `file`.")
    deleted: Literal[True] = Field(default=True, description="Always true.")


@router.post(
    "",
    summary="Upload a file",
    response_model_exclude_none=True,
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    },
)
async def create_file(request: Request, caller: Submitter, ctx: Ctx) -> FileObject:
    """Store a file of lines for a batch. It is written to disk as it comes, and there as a whole
    or not at all; its lines are checked by the batch."""
    folder = ctx.settings.files_dir
    async with upload(request, folder, ctx.settings.max_upload_mib * 2**20) as form:
        seconds = _seconds(form.fields)
        file_id = files.new_id("file-")
        size = await run_sync(files.keep, form.out, folder, file_id)
    new = rows.NewFile(file_id, caller.owner, form.filename, rows.INPUT, size, seconds)
    try:
        return _told(await run_sync(rows.insert_file, ctx.db, new))
    except PenstockError:
        await run_sync(files.remove, folder, file_id)
        raise


@router.get("", summary="Files")
def list_files(
    caller: Reader,
    ctx: Ctx,
    purpose: Annotated[
        Literal["batch", "batch_output"] | None, Query(description="Those for this alone.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="How many at most.")] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="`asc`: oldest first.")] = "desc",
    after: Annotated[str | None, Query(description="The id after which the page begins.")] = None,
) -> FileList:
    """Files in order of the time they were made."""
    found = rows.files_page(
        ctx.db,
        owner=caller.sees,
        purpose=purpose,
        after=None if after is None else _known(after),
        limit=limit + 1,
        oldest_first=order == "asc",
    )
    shown = [_told(each) for each in found[:limit]]
    return FileList(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > limit,
    )


@router.get("/{file_id}", summary="One file", response_model_exclude_none=True)
def get_file(file_id: FileId, caller: Reader, ctx: Ctx) -> FileObject:
    """What is known of the file, without its content."""
    return _told(rows.file(ctx.db, _known(file_id), owner=caller.sees))


@router.delete("/{file_id}", summary="Remove a file")
def delete_file(file_id: FileId, caller: Submitter, ctx: Ctx) -> FileDeleted:
    """Remove the file for good. Refused while a batch that has not ended needs it."""
    rows.delete_file(ctx.db, _known(file_id), owner=caller.sees)
    files.remove(ctx.settings.files_dir, file_id)
    return FileDeleted(id=file_id)


@router.get(
    "/{file_id}/content",
    summary="A file's content",
    response_class=FileResponse,
    responses={
        200: {
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
            "description": "Its bytes.",
        }
    },
)
def get_file_content(file_id: FileId, caller: Reader, ctx: Ctx) -> FileResponse:
    """The bytes of the file, as they were uploaded or written."""
    found = rows.file(ctx.db, _known(file_id), owner=caller.sees)
    place = files.place(ctx.settings.files_dir, found.id)
    if not place.is_file():
        raise NotFound("content of file", file_id)
    return FileResponse(place, media_type="application/octet-stream", filename=f"{file_id}.jsonl")


def _known(file_id: str) -> str:
    """Raises NotFound for what is no file's id, which no database need be asked for."""
    if not files.FILE_ID.fullmatch(file_id):
        raise NotFound("file", file_id)
    return file_id


def _seconds(fields: dict[str, str]) -> int | None:
    """How long the file stays. Raises ApiError for fields that are not as they should be."""
    for name in fields:
        if name not in ("purpose", _ANCHOR, _SECONDS):
            raise _refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    if "purpose" not in fields:
        text = "Missing required parameter: 'purpose'."
        raise _refused(text, "purpose", "missing_required_parameter")
    if fields["purpose"] != rows.INPUT:
        text = f"Invalid value: '{fields['purpose']}'. Supported values are: '{rows.INPUT}'."
        raise _refused(text, "purpose", "invalid_value")
    anchor, seconds = fields.get(_ANCHOR), fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        text = "Invalid value of 'expires_after.anchor'. Supported values are: 'created_at'."
        raise _refused(text, "expires_after.anchor", "invalid_value")
    number = int(seconds) if seconds and seconds.isascii() and seconds.isdecimal() else 0
    if not LEAST_SECONDS <= number <= MOST_SECONDS:
        text = f"Invalid 'expires_after.seconds': expected {LEAST_SECONDS} to {MOST_SECONDS}."
        raise _refused(text, "expires_after.seconds", "invalid_value")
    return number


def _refused(text: str, param: str, code: str) -> ApiError:
    return ApiError(400, text, param=param, code=code)


def _told(file: rows.File) -> FileObject:
    return FileObject.model_validate(
        {
            "id": file.id,
            "bytes": file.bytes,
            "created_at": int(file.created_at.timestamp()),
            "expires_at": None if file.expires_at is None else int(file.expires_at.timestamp()),
            "filename": file.filename,
            "purpose": file.purpose,
        }
    )
