"""The rows of files: who has which, until when. A file is there from its row on.

The bytes come before the row and go after it, so that a row always has its bytes. An input file
stays, whatever its time, while a batch that has not ended needs it. Knows nothing of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, exists, insert, or_, select, text, update

from orchestrator.db.columns import now
from orchestrator.db.database import Database
from orchestrator.db.tables import OPEN_BATCH, BatchRow, FileRow
from orchestrator.errors import Conflict, NotFound

INPUT, OUTPUT = "batch", "batch_output"


@dataclass(frozen=True, slots=True)
class File:
    """One file; `purpose` is `batch` or `batch_output`, `expires_at` None: it stays."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file whose bytes are on disk; `expires_seconds` counts from now on."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    expires_seconds: int | None = None


def insert_file(db: Database, new: NewFile) -> File:
    """Enter a file whose bytes are whole on disk."""
    with db.write() as tx:
        return enter(tx, new)


def enter(tx: Connection, new: NewFile) -> File:
    """The same in a transaction that somebody else commits."""
    created = tx.scalars(select(now())).one()
    seconds = new.expires_seconds
    expires = None if seconds is None else created + timedelta(seconds=seconds)
    made = File(new.id, new.owner, new.filename, new.purpose, new.bytes, created, expires)
    values = {name: getattr(made, name) for name in File.__dataclass_fields__}
    tx.execute(insert(FileRow).values(**values))
    return made


def file(db: Database, file_id: str, *, owner: str | None = None) -> File:
    """One file, of that owner alone (None: of anybody). Raises NotFound."""
    with db.read() as rows:
        row = rows.execute(_files(owner).where(FileRow.id == file_id)).one_or_none()
    if row is None:
        raise NotFound("file", file_id)
    return File(*row)


def files_page(
    db: Database,
    *,
    owner: str | None = None,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 10_000,
    oldest_first: bool = False,
) -> list[File]:
    """Files in order of the time they were made, those beyond the file `after`.

    Raises NotFound when there is no such file `after`.
    """
    wanted = _files(owner)
    if purpose is not None:
        wanted = wanted.where(FileRow.purpose == purpose)
    if after is not None:
        wanted = wanted.where(_beyond(file(db, after, owner=owner), oldest_first))
    order = (FileRow.created_at, FileRow.id)
    wanted = wanted.order_by(*(order if oldest_first else (column.desc() for column in order)))
    with db.read() as rows:
        return [File(*row) for row in rows.execute(wanted.limit(limit))]


def delete_file(db: Database, file_id: str, *, owner: str | None = None) -> None:
    """The file is gone for everybody; its bytes go next (`deleted_files`).

    Raises NotFound, Conflict while a batch that has not ended needs it.
    """
    with db.write() as tx:
        lock_file(tx, file_id, owner)
        if tx.scalar(select(_needed()).where(FileRow.id == file_id)):
            raise Conflict("file", file_id, "a batch that has not ended needs it")
        tx.execute(update(FileRow).where(FileRow.id == file_id).values(deleted_at=now()))


def lock_file(tx: Connection, file_id: str, owner: str | None) -> File:
    """The file, kept from changing until the transaction's end. Raises NotFound."""
    row = tx.execute(_files(owner).where(FileRow.id == file_id).with_for_update()).one_or_none()
    if row is None:
        raise NotFound("file", file_id)
    return File(*row)


def expire_files(db: Database) -> int:
    """Files past their time are gone, but for those that a batch still needs; how many."""
    late = and_(
        FileRow.deleted_at.is_(None),
        FileRow.expires_at <= select(now()).scalar_subquery(),
        ~_needed(),
    )
    with db.read() as rows:  # looked at often, and seldom true: no writer is kept waiting
        if rows.scalar(select(FileRow.id).where(late).limit(1)) is None:
            return 0
    with db.write() as tx:
        return tx.execute(update(FileRow).where(late).values(deleted_at=now())).rowcount


def deleted_files(db: Database, limit: int = 1000) -> list[str]:
    """Ids of files that are gone and whose bytes may still be there."""
    with db.read() as rows:
        gone = select(FileRow.id).where(FileRow.deleted_at.is_not(None)).limit(limit)
        return list(rows.scalars(gone))


def forget_files(db: Database, ids: Sequence[str]) -> None:
    """Remove the rows of deleted files, their bytes being gone."""
    if ids:
        with db.write() as tx:
            gone = FileRow.deleted_at.is_not(None)
            tx.execute(delete(FileRow).where(FileRow.id.in_(ids), gone))


def known_files(db: Database, ids: Iterable[str]) -> set[str]:
    """Those of the ids that have a row."""
    with db.read() as rows:
        return set(rows.scalars(select(FileRow.id).where(FileRow.id.in_(list(ids)))))


def _files(owner: str | None) -> Select[Any]:
    """Files that are not deleted and, unless a batch needs them, not past their time."""
    columns = [getattr(FileRow, name) for name in File.__dataclass_fields__]
    fresh = or_(FileRow.expires_at.is_(None), FileRow.expires_at > select(now()).scalar_subquery())
    wanted = select(*columns).where(FileRow.deleted_at.is_(None), fresh)
    return wanted if owner is None else wanted.where(FileRow.owner == owner)


def _needed() -> Any:
    return exists().where(BatchRow.input_file_id == FileRow.id, text(OPEN_BATCH))


def _beyond(last: File, oldest_first: bool) -> Any:
    at, same = FileRow.created_at, FileRow.created_at == last.created_at
    if oldest_first:
        return or_(at > last.created_at, and_(same, FileRow.id > last.id))
    return or_(at < last.created_at, and_(same, FileRow.id < last.id))
