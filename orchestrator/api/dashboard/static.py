"""The files that pages load: read once, named by their content so that browsers keep them.

Only what lies in `static/` when the process starts can be asked for. Knows nothing of pages.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Response

from orchestrator.errors import NotFound

_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_YEAR = "public, max-age=31536000, immutable"

router = APIRouter()


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file as it is sent."""

    body: bytes
    kind: str


def _read(folder: Path) -> tuple[str, dict[str, StaticFile]]:
    files = {
        path.relative_to(folder).as_posix(): StaticFile(path.read_bytes(), _KINDS[path.suffix])
        for path in sorted(folder.rglob("*"))
        if path.suffix in _KINDS
    }
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(name.encode() + b"\0" + file.body)
    return digest.hexdigest()[:12], files


VERSION, FILES = _read(Path(__file__).parent / "static")


def static_url(name: str) -> str:
    """Where the page finds a file; the address changes when any file does."""
    if name not in FILES:
        raise KeyError(name)
    return f"/static/{VERSION}/{name}"


@router.get("/static/{version}/{name:path}", include_in_schema=False)
async def static_file(version: str, name: str) -> Response:
    """One file of `static/`; of another version than this, today's, not to be kept."""
    if name not in FILES:
        raise NotFound("file", name)
    file = FILES[name]
    kept = _YEAR if version == VERSION else "no-cache"
    return Response(file.body, media_type=file.kind, headers={"cache-control": kept})


@router.get("/favicon.ico", include_in_schema=False)
async def icon() -> Response:
    """What a browser asks for by itself where no page names an icon, as a part of one does not."""
    file = FILES["penstock.svg"]
    return Response(file.body, media_type=file.kind, headers={"cache-control": "max-age=86400"})
