"""Who works on what, until when: claim, release, and the return of what was left behind.

A claim raises the request's epoch; whatever still carries an older one writes nothing. Leases run
on the database's clock. Knows nothing of what the worker does with a claim, nor of messages.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, case, exists, func, select, true, tuple_, update
from sqlalchemy.sql.elements import ColumnElement

from orchestrator.db.database import Database
from orchestrator.db.tables import (
    CANCELLED,
    FAILED,
    QUEUED,
    RUNNING,
    ChoiceRow,
    ChunkRow,
    ItemRow,
    JobRow,
    PointRow,
    RequestRow,
    now,
    seconds_from_now,
)

MAX_IDLE_ATTEMPTS = 3
TOKEN_TYPE = np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class ClaimedChoice:
    """What is already known of one completion: its persisted tokens, int32, shape (n_tokens,)."""

    choice: int
    token_ids: NDArray[np.int32]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Claimed:
    """One request taken by one worker: all it needs to generate, and the fence for its writes.

    `params` are the job's, templates intact; `point_params` go over them, `columns` into them
    (`orchestrator.spec.plan.resolve`). `created` is in Unix seconds, the same for every attempt.
    `idle_attempts`: claims in a row without one new token, this one counted.
    """

    request_id: int
    epoch: int
    attempt: int
    job_id: str
    model: str
    params: Mapping[str, object]
    point_params: Mapping[str, object]
    columns: Mapping[str, object]
    seed: int
    created: int
    choices: tuple[ClaimedChoice, ...]
    idle_attempts: int = 0


def claim(
    db: Database,
    *,
    model: str,
    worker_id: str,
    limit: int,
    lease_seconds: float,
    job_id: str | None = None,
) -> list[Claimed]:
    """Take queued requests of `model` in the order (priority, job, item, point).

    With `job_id`, of that job alone.

    `limit` counts unfinished choices; a first request with more of them than that is taken all
    the same. A request already claimed MAX_IDLE_ATTEMPTS times without one new token is failed
    with the code `poison` instead. Two claims never return the same request. Empty when there is
    nothing to do, or `limit` < 1.
    """
    taken: list[int] = []
    with db.write() as tx:
        for job in _jobs_in_order(tx, model, job_id) if limit > 0 else ():
            chosen, limit = _take(tx, job, limit, first=not taken)
            taken += chosen
            if limit < 1:
                break
        if not taken:
            return []
        _mark_running(tx, taken, worker_id, lease_seconds)
        return _load(tx, taken)


def release(db: Database, claims: Iterable[tuple[int, int]]) -> int:
    """Give back (request_id, epoch) pairs on purpose; return how many were still held.

    The attempt does not count as an idle one. Requests of a cancelled job become cancelled.
    """
    pairs = list(claims)
    if not pairs:
        return 0
    held = tuple_(RequestRow.id, RequestRow.epoch).in_(pairs)
    not_idle = case((RequestRow.idle_attempts > 0, RequestRow.idle_attempts - 1), else_=0)
    with db.write() as tx:
        return _send_back(tx, held, idle_attempts=not_idle)


def release_expired(db: Database) -> int:
    """Give back what no worker renewed in time; return how many requests."""
    with db.write() as tx:
        return _send_back(tx, RequestRow.leased_until < now())


def release_worker(db: Database, worker_id: str) -> int:
    """Give back what a worker known to be dead held; return how many requests."""
    with db.write() as tx:
        return _send_back(tx, RequestRow.worker_id == worker_id)


def _jobs_in_order(tx: Connection, model: str, job_id: str | None) -> Sequence[str]:
    waiting = exists().where(RequestRow.job_id == JobRow.id, RequestRow.state == QUEUED)
    jobs = (
        select(JobRow.id)
        .where(
            JobRow.model == model,
            JobRow.planned_at.is_not(None),
            JobRow.paused_at.is_(None),
            JobRow.cancelled_at.is_(None),
            waiting,
            JobRow.id == job_id if job_id is not None else true(),
        )
        .order_by(JobRow.priority.desc(), JobRow.number)
    )
    return tx.scalars(jobs).all()


def _take(tx: Connection, job_id: str, limit: int, *, first: bool) -> tuple[list[int], int]:
    """Ids of the job's next requests, locked, and what is left of the limit (0: full)."""
    chosen: list[int] = []
    while limit > 0:
        rows = _next_queued(tx, job_id, limit, after=chosen[-1] if chosen else -1)
        poison = [row.id for row in rows if row.idle_attempts >= MAX_IDLE_ATTEMPTS]
        if poison:
            _fail_poison(tx, poison)
        for row in rows:
            if row.idle_attempts >= MAX_IDLE_ATTEMPTS:
                continue
            if row.unfinished > limit and not (first and not chosen):
                return chosen, 0
            chosen.append(row.id)
            limit -= max(1, row.unfinished)
        if not poison:
            break
    return chosen, max(limit, 0)


def _next_queued(
    tx: Connection, job_id: str, limit: int, after: int
) -> Sequence[Row[tuple[int, int, int]]]:
    unfinished = (
        select(func.count())
        .where(ChoiceRow.request_id == RequestRow.id, ChoiceRow.finish_reason.is_(None))
        .scalar_subquery()
    )
    queued = (
        select(RequestRow.id, RequestRow.idle_attempts, unfinished.label("unfinished"))
        .where(RequestRow.job_id == job_id, RequestRow.state == QUEUED, RequestRow.id > after)
        .order_by(RequestRow.id)
        .limit(limit)
        # SQLite has one writer and renders nothing here.
        .with_for_update(skip_locked=True, of=RequestRow)
    )
    return tx.execute(queued).all()


def _fail_poison(tx: Connection, ids: list[int]) -> None:
    tx.execute(
        update(RequestRow)
        .where(RequestRow.id.in_(ids))
        .values(
            state=FAILED,
            finished_at=now(),
            error_code="poison",
            error_message=f"claimed {MAX_IDLE_ATTEMPTS} times without one new token",
        )
    )


def _mark_running(tx: Connection, ids: list[int], worker_id: str, lease_seconds: float) -> None:
    tx.execute(
        update(RequestRow)
        .where(RequestRow.id.in_(ids))
        .values(
            state=RUNNING,
            epoch=RequestRow.epoch + 1,
            attempt=RequestRow.attempt + 1,
            idle_attempts=RequestRow.idle_attempts + 1,
            worker_id=worker_id,
            leased_until=seconds_from_now(lease_seconds),
            started_at=func.coalesce(RequestRow.started_at, now()),
        )
    )


def _load(tx: Connection, ids: list[int]) -> list[Claimed]:
    rows = tx.execute(
        select(
            RequestRow.id,
            RequestRow.epoch,
            RequestRow.attempt,
            RequestRow.job_id,
            RequestRow.seed,
            RequestRow.created_at,
            RequestRow.idle_attempts,
            JobRow.model,
            JobRow.spec,
            PointRow.params.label("point_params"),
            ItemRow.columns.label("item_columns"),
        )
        .join(JobRow, JobRow.id == RequestRow.job_id)
        .join(PointRow, PointRow.id == RequestRow.point_id)
        .join(ItemRow, ItemRow.id == RequestRow.item_id)
        .where(RequestRow.id.in_(ids))
    )
    found = {row.id: row for row in rows}
    choices = _choices(tx, ids)
    return [
        Claimed(
            request_id=row.id,
            epoch=row.epoch,
            attempt=row.attempt,
            job_id=row.job_id,
            model=row.model,
            params=row.spec["params"],
            point_params=row.point_params,
            columns=row.item_columns,
            seed=row.seed,
            created=int(row.created_at.timestamp()),
            choices=choices[row.id],
            idle_attempts=row.idle_attempts,
        )
        for row in (found[request_id] for request_id in ids)
    ]


def _choices(tx: Connection, ids: list[int]) -> dict[int, tuple[ClaimedChoice, ...]]:
    tokens: dict[tuple[int, int], bytes] = {}
    stored = (
        select(ChunkRow.request_id, ChunkRow.choice, ChunkRow.token_ids)
        .where(ChunkRow.request_id.in_(ids))
        .order_by(ChunkRow.request_id, ChunkRow.choice, ChunkRow.token_start)
    )
    for request_id, choice, token_ids in tx.execute(stored):
        tokens[request_id, choice] = tokens.get((request_id, choice), b"") + token_ids
    found: dict[int, tuple[ClaimedChoice, ...]] = {}
    rows = (
        select(ChoiceRow.request_id, ChoiceRow.choice, ChoiceRow.finish_reason)
        .where(ChoiceRow.request_id.in_(ids))
        .order_by(ChoiceRow.request_id, ChoiceRow.choice)
    )
    for request_id, choice, finish_reason in tx.execute(rows):
        ids_so_far = np.frombuffer(tokens.get((request_id, choice), b""), TOKEN_TYPE)
        claimed = ClaimedChoice(choice, ids_so_far.astype(np.int32), finish_reason)
        found[request_id] = (*found.get(request_id, ()), claimed)
    return found


def _send_back(
    tx: Connection, where: ColumnElement[bool], *, idle_attempts: ColumnElement[int] | None = None
) -> int:
    """running -> queued, or cancelled where the job is; return how many requests."""
    jobs = select(RequestRow.job_id).where(RequestRow.state == RUNNING, where)
    # Either the cancellation is seen here, or it waits and then sees these requests queued.
    lock = select(JobRow.id).where(JobRow.id.in_(jobs)).order_by(JobRow.id)
    if not tx.execute(lock.with_for_update(read=True)).all():
        return 0
    gone = exists().where(JobRow.id == RequestRow.job_id, JobRow.cancelled_at.is_not(None))
    back = (
        update(RequestRow)
        .where(RequestRow.state == RUNNING, where)
        .values(
            state=case((gone, CANCELLED), else_=QUEUED),
            finished_at=case((gone, now()), else_=None),
            leased_until=None,
        )
    )
    if idle_attempts is not None:
        back = back.values(idle_attempts=idle_attempts)
    return tx.execute(back).rowcount
