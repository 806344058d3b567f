"""Chats by their completion's id: found, listed, removed.

A chat is a job of one request, whose id is the first of its job's range. Knows nothing of what a
completion looks like.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import ColumnElement, delete, select

from orchestrator.db.database import Database
from orchestrator.db.tables import (
    CHAT,
    QUEUED,
    ROWS_PER_JOB,
    RUNNING,
    SUCCEEDED,
    JobRow,
    RequestRow,
)
from orchestrator.errors import Conflict, NotFound
from orchestrator.spec.bodies import METADATA

KIND = "chat completion"
_REQUEST = RequestRow.id == JobRow.number * ROWS_PER_JOB


def request_of(db: Database, job_id: str) -> int:
    """The id of the one request of a chat. Raises NotFound."""
    with db.read() as rows:
        number = rows.scalar(select(JobRow.number).where(JobRow.id == job_id))
    if number is None:
        raise NotFound("job", job_id)
    return number * ROWS_PER_JOB


def find_chat(db: Database, handle: str, *, owner: str | None = None) -> str:
    """The id of the job whose completion has this id and is whole. Raises NotFound."""
    wanted = (
        select(JobRow.id)
        .join(RequestRow, _REQUEST)
        .where(*_seen(owner), JobRow.handle == handle, RequestRow.state == SUCCEEDED)
    )
    with db.read() as rows:
        found = rows.scalar(wanted)
    if found is None:
        raise NotFound(KIND, handle)
    return found


def chats_page(
    db: Database,
    *,
    owner: str | None = None,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    after: str | None = None,
    newest_first: bool = False,
    limit: int = 20,
) -> list[str]:
    """Ids of jobs whose completions are whole, those after the completion `after`, oldest first.

    `metadata`: with these pairs among theirs; no key has a quote or a backslash.

    Raises NotFound where `after` is no completion that the owner may see.
    """
    wanted = select(JobRow.id).join(RequestRow, _REQUEST)
    wanted = wanted.where(*_seen(owner), RequestRow.state == SUCCEEDED)
    if model is not None:
        wanted = wanted.where(JobRow.model == model)
    for key, value in (metadata or {}).items():
        pair = JobRow.spec["params"][METADATA][key]
        wanted = wanted.where(pair.as_string() == value)
    if after is not None:
        last = _number(db, after, owner)
        wanted = wanted.where(JobRow.number < last if newest_first else JobRow.number > last)
    order = JobRow.number.desc() if newest_first else JobRow.number
    with db.read() as rows:
        return list(rows.scalars(wanted.order_by(order).limit(limit)))


def delete_chat(db: Database, handle: str, *, owner: str | None = None) -> None:
    """Remove the chat and all that was stored of it.

    Raises NotFound, Conflict while it is at work.
    """
    wanted = (
        select(JobRow.id, RequestRow.state)
        .join(RequestRow, _REQUEST)
        .where(*_seen(owner), JobRow.handle == handle)
        .with_for_update(of=RequestRow)
    )
    with db.write() as tx:
        found = tx.execute(wanted).one_or_none()
        if found is None:
            raise NotFound(KIND, handle)
        if found.state in (QUEUED, RUNNING):
            raise Conflict(KIND, handle, "has not ended yet")
        tx.execute(delete(JobRow).where(JobRow.id == found.id))


def _number(db: Database, handle: str, owner: str | None) -> int:
    with db.read() as rows:
        number = rows.scalar(select(JobRow.number).where(*_seen(owner), JobRow.handle == handle))
    if number is None:
        raise NotFound(KIND, handle)
    return number


def _seen(owner: str | None) -> list[ColumnElement[bool]]:
    """Chats, whole as rows, of the owner (None: of all)."""
    seen = [JobRow.kind == CHAT, JobRow.planned_at.is_not(None)]
    return seen if owner is None else [*seen, JobRow.owner == owner]
