"""Bytes of files in one folder, named by their ids: whole and on disk, or not there.

A file is written beside its place under a name of its own, and renamed when it is whole; its row
comes after. What a kill leaves behind (parts, bytes without a row) is found by `strays`. Knows
nothing of rows, of lines or of who may read; no name from outside ever becomes a path.
"""

from __future__ import annotations

import os
import re
import secrets
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import NotFound, WorkerError

FILE_ID = re.compile(r"file-[A-Za-z0-9]{24}")
_ALPHABET = string.ascii_letters + string.digits
_PART = ".part"


def new_id(prefix: str) -> str:
    """The prefix and 24 random letters and digits: 142 bits, not to be guessed."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def place(folder: Path, file_id: str) -> Path:
    """Where the bytes of the file lie. Raises NotFound for what is no file's id."""
    if not FILE_ID.fullmatch(file_id):
        raise NotFound("file", file_id)
    return folder / file_id


@contextmanager
def incoming(folder: Path) -> Iterator[BinaryIO]:
    """A new file to write to; gone at the block's end unless `keep` has given it its name.

    Raises WorkerError where the disk cannot.
    """
    with _on_disk(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = folder / f".{secrets.token_hex(12)}{_PART}"
        try:
            with part.open("xb") as out:
                yield out
        finally:
            part.unlink(missing_ok=True)


def keep(out: BinaryIO, folder: Path, file_id: str) -> int:
    """Give what was written its name, all of it on disk; its length in bytes."""
    with _on_disk(folder):
        out.flush()
        os.fsync(out.fileno())
        os.replace(out.name, place(folder, file_id))
        _sync(folder)
        return out.tell()


def remove(folder: Path, file_id: str) -> None:
    """Remove the bytes, if they are there."""
    with _on_disk(folder):
        place(folder, file_id).unlink(missing_ok=True)


def strays(folder: Path, older_than_seconds: float) -> tuple[list[Path], list[str]]:
    """What a kill may have left, that old: parts of files, and the ids of whole ones.

    Whoever asks must see for itself which of the whole ones have a row.
    """
    parts: list[Path] = []
    whole: list[str] = []
    if not folder.is_dir():
        return parts, whole
    before = time.time() - older_than_seconds
    for entry in os.scandir(folder):
        if entry.stat(follow_symlinks=False).st_mtime > before:
            continue
        if entry.name.startswith(".") and entry.name.endswith(_PART):
            parts.append(Path(entry.path))
        elif FILE_ID.fullmatch(entry.name):
            whole.append(entry.name)
    return parts, whole


@contextmanager
def _on_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Not the path: the text may reach who asked.
        raise WorkerError("files", f"the files' folder: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    """The new name itself on disk, where folders can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
