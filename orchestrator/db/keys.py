"""API keys: made, found by their hash, listed, revoked.

A key itself is never written: 256 random bits need no salt, so its SHA-256 is what is kept and
looked up. Knows nothing of HTTP or of what a scope allows.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, or_, select, update

from orchestrator.db.columns import now
from orchestrator.db.database import Database
from orchestrator.db.tables import KeyRow
from orchestrator.errors import NotFound, SpecError

SCOPES = ("read", "submit", "admin")
_SHOWN = 12
_USED_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Key:
    """One key as it may be shown: `prefix` is how it begins."""

    id: str
    name: str
    owner: str
    prefix: str
    scopes: tuple[str, ...]
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


def digest(secret: str) -> str:
    """What is kept of a key: its SHA-256, hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def create_key(
    db: Database, name: str, scopes: Iterable[str] = ("read", "submit"), owner: str | None = None
) -> tuple[Key, str]:
    """A new key and its text, which nobody can read again. `owner` is the name by default.

    Raises SpecError for an unknown scope, and for a name or owner that is empty or too long.
    """
    owner, given = name if owner is None else owner, set(scopes)
    wanted = [scope for scope in SCOPES if scope in given]
    if not wanted or len(wanted) < len(given):
        raise SpecError(
            "scopes", "some of " + ", ".join(SCOPES), ", ".join(sorted(given)) or "none"
        )
    for what, text in (("name", name), ("owner", owner)):
        if not 1 <= len(text) <= 100 or not text.isprintable():
            raise SpecError(what, "1 to 100 printable letters", repr(text[:100]))
    secret = "psk_" + secrets.token_urlsafe(32)
    row = {
        "id": "key_" + secrets.token_hex(8),
        "name": name,
        "owner": owner,
        "prefix": secret[:_SHOWN],
        "hash": digest(secret),
        "scopes": " ".join(wanted),
    }
    with db.write() as tx:
        tx.execute(KeyRow.__table__.insert(), row)  # type: ignore[attr-defined]
    return _only(db, row["id"]), secret


def find_key(db: Database, hash: str) -> Key | None:
    """The key with this SHA-256 unless it was revoked."""
    found = _read(db, _keys().where(KeyRow.hash == hash, KeyRow.revoked_at.is_(None)))
    return found[0] if found else None


def keys(db: Database) -> list[Key]:
    """All of them, the newest first, the revoked too."""
    return _read(db, _keys().order_by(KeyRow.created_at.desc(), KeyRow.id))


def has_keys(db: Database) -> bool:
    """Whether any key would be taken."""
    return bool(_read(db, _keys().where(KeyRow.revoked_at.is_(None)).limit(1)))


def revoke_key(db: Database, given: str) -> Key:
    """Revoke the key of this id, or beginning of its text; again changes nothing.

    Raises NotFound where none or more than one is meant.
    """
    same = or_(KeyRow.id == given, KeyRow.prefix == given)
    found = _read(db, _keys().where(same))
    if len(found) != 1:
        raise NotFound("key", given)
    ours = (KeyRow.id == found[0].id, KeyRow.revoked_at.is_(None))
    with db.write() as tx:
        tx.execute(update(KeyRow).where(*ours).values(revoked_at=now()))
    return _only(db, found[0].id)


def mark_used(db: Database, key: Key) -> None:
    """Note that a key is in use, once an hour: what reads must not become what writes."""
    used = key.last_used_at
    if used is not None and (datetime.now(UTC) - used).total_seconds() < _USED_SECONDS:
        return
    with db.write() as tx:
        tx.execute(update(KeyRow).where(KeyRow.id == key.id).values(last_used_at=now()))


def _only(db: Database, id: str) -> Key:
    (found,) = _read(db, _keys().where(KeyRow.id == id))
    return found


def _keys() -> Select[*tuple[Any, ...]]:
    return select(
        KeyRow.id,
        KeyRow.name,
        KeyRow.owner,
        KeyRow.prefix,
        KeyRow.scopes,
        KeyRow.created_at,
        KeyRow.last_used_at,
        KeyRow.revoked_at,
    )


def _read(db: Database, query: Select[*tuple[Any, ...]]) -> list[Key]:
    with db.read() as tx:
        rows = tx.execute(query).mappings().all()
    return [Key(**{**row, "scopes": tuple(row["scopes"].split())}) for row in rows]
