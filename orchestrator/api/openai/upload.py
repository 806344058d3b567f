"""A multipart upload -> one file on disk and the fields beside it, however large it is.

What comes is written as it comes: neither the file nor the form is ever in memory. Knows nothing
of rows, nor of what the fields mean.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.concurrency import contextmanager_in_threadpool
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from orchestrator import files
from orchestrator.api.errors import ApiError

FILE = "file"
_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 1024
_MAX_NAME = 255
_WRITE_BYTES = 2**20
# Around the file: boundaries, headers and fields.
_FORM_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Upload:
    """A whole form; its file is in `out`, not yet under a name of its own."""

    out: BinaryIO
    filename: str
    fields: dict[str, str]


@asynccontextmanager
async def upload(request: Request, folder: Path, max_bytes: int) -> AsyncIterator[Upload]:
    """Receive the form; its file is gone at the block's end unless it was kept.

    Raises ApiError: 400 for what is no such form, 413 as soon as the file is larger than
    `max_bytes`; WorkerError where the disk cannot.
    """
    try:
        async with contextmanager_in_threadpool(files.incoming(folder)) as out:
            form = await _received(request, out, max_bytes)
            if form.filename is None:
                text = "Missing required parameter: 'file'."
                raise ApiError(400, text, param=FILE, code="missing_required_parameter")
            yield Upload(out, form.filename, form.texts())
    except ApiError as error:
        # Otherwise the server would take in, for nobody, whatever is still being sent.
        error.headers["connection"] = "close"
        raise


async def _received(request: Request, out: BinaryIO, max_bytes: int) -> _Form:
    if _announced(request) > max_bytes + _FORM_BYTES:
        raise _too_large(max_bytes)
    form = _Form(max_bytes)
    parser = _parser(request, form)
    try:
        async for chunk in request.stream():
            parser.write(chunk)
            if form.waiting_bytes >= _WRITE_BYTES:
                await run_sync(form.write, out)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, f"The form cannot be read: {error}") from None
    except ClientDisconnect:
        raise ApiError(400, "The upload was cut off.") from None
    except HTTPException as error:  # the door's own bounds: of the whole body, of its time
        raise ApiError(error.status_code, error.detail) from None
    if not form.ended:
        raise ApiError(400, "The form ends in the middle.")
    await run_sync(form.write, out)
    return form


def _announced(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdecimal() else 0


def _too_large(max_bytes: int) -> ApiError:
    text = f"The file is larger than {max_bytes} bytes."
    return ApiError(413, text, param=FILE, code="file_too_large")


def _parser(request: Request, form: _Form) -> MultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(400, "Expected a form, with the content type 'multipart/form-data'.")
    try:
        return MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": form.part_begins,
                "on_header_field": form.header_field,
                "on_header_value": form.header_value,
                "on_header_end": form.header_ends,
                "on_headers_finished": form.headers_end,
                "on_part_data": form.part_data,
                "on_end": form.form_ends,
            },
        )
    except FormParserError as error:
        raise ApiError(400, f"The form cannot be read: {error}") from None


@dataclass(slots=True)
class _Form:
    """How far the form is. `part` is the name of the field that is being read."""

    max_bytes: int
    fields: dict[str, bytearray] = field(default_factory=dict)
    filename: str | None = None
    waiting: list[bytes] = field(default_factory=list)
    waiting_bytes: int = 0
    size: int = 0
    ended: bool = False
    part: str = ""
    header: bytes = b""
    value: bytes = b""
    disposition: bytes = b""

    def part_begins(self) -> None:
        self.header, self.value, self.disposition = b"", b"", b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def header_ends(self) -> None:
        if self.header.lower() == b"content-disposition":
            self.disposition = self.value
        self.header, self.value = b"", b""

    def headers_end(self) -> None:
        _, options = parse_options_header(self.disposition)
        self.part = options.get(b"name", b"").decode(errors="replace")
        twice = self.part in self.fields or (self.part == FILE and self.filename is not None)
        if not self.part or twice or len(self.fields) >= _MAX_FIELDS:
            text = "Expected a form of fields with a name each, none of them twice."
            raise ApiError(400, text, param=self.part[:_MAX_NAME] or None, code="invalid_value")
        if self.part == FILE:
            self.filename = _shown(options.get(b"filename", b""))
        else:
            self.fields[self.part] = bytearray()

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self.part != FILE:
            self.fields[self.part] += data[start:end]
            if len(self.fields[self.part]) > _MAX_FIELD_BYTES:
                text = f"The field is longer than {_MAX_FIELD_BYTES} bytes."
                raise ApiError(400, text, param=self.part[:_MAX_NAME], code="invalid_value")
            return
        self.size += end - start
        if self.size > self.max_bytes:
            raise _too_large(self.max_bytes)
        self.waiting.append(data[start:end])
        self.waiting_bytes += end - start

    def form_ends(self) -> None:
        self.ended = True

    def write(self, out: BinaryIO) -> None:
        """Write what has come of the file."""
        out.writelines(self.waiting)
        self.waiting.clear()
        self.waiting_bytes = 0

    def texts(self) -> dict[str, str]:
        return {name: value.decode(errors="replace") for name, value in self.fields.items()}


def _shown(filename: bytes) -> str:
    """The name to show, never to open: no folders, nothing that cannot be printed."""
    name = filename.decode(errors="replace").replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in name if letter.isprintable())[:_MAX_NAME] or "file"
