"""Who works on what, until when: requests are claimed, with all that a worker needs for them.

A claim raises the request's epoch; whatever still carries an older one writes nothing. Leases run
on the database's clock. Whose turn it is stands in `turns.py`. Knows nothing of what the worker
does with a claim, nor of messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, func, select, update

from orchestrator.db import turns
from orchestrator.db.columns import now, seconds_from_now
from orchestrator.db.database import Database
from orchestrator.db.events import note_started
from orchestrator.db.tables import (
    CHAT,
    FAILED,
    JOB,
    RUNNING,
    ChoiceRow,
    ChunkRow,
    ItemRow,
    JobRow,
    PointRow,
    RequestRow,
)
from orchestrator.db.turns import Turn

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
    `idle_attempts`: claims in a row without one new token, this one counted. `kind`: the job's.
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
    kind: str = JOB

    @property
    def verbatim(self) -> bool:
        """`columns` are the whole parameters, nothing a template."""
        return self.kind != JOB

    @property
    def urgent(self) -> bool:
        """Somebody sits in front of it."""
        return self.kind == CHAT

    @property
    def suspect(self) -> bool:
        """It was claimed before without one new token: claim nothing beside it until it has one."""
        return self.idle_attempts > 1


def claim(
    db: Database,
    *,
    model: str,
    worker_id: str,
    limit: int,
    lease_seconds: float,
    job_id: str | None = None,
    alone: bool = True,
    chats: bool = False,
) -> list[Claimed]:
    """Take queued requests of `model`: by priority, then fairly between jobs (`turns.py`).

    A job's own requests come in the order (item, point). With `job_id`, of that job alone. No job
    gets more running requests than its `max_parallel`. A delayed request is not taken before its
    `retry_at`. Two claims never return the same request. `chats`: requests of chats alone.

    `limit` counts unfinished choices; a first request with more of them than that is taken all
    the same. Empty when there is nothing to do, or `limit` < 1.

    A suspect, claimed before without one new token, is only taken when `alone` says that every
    request the worker holds has brought a token that is flushed, and then as the only one: if its
    worker dies now, nobody else is suspected. A suspect claimed MAX_IDLE_ATTEMPTS times without
    one new token, those that were excused left out, is failed with the code `poison` instead.
    """
    if limit < 1:
        return []
    with db.write() as tx:
        turns.end_delays(tx)
        jobs = turns.open_jobs(tx, model, job_id, chats=chats)
        taken = _take(tx, jobs, limit, alone)
        if not taken:
            return []
        _mark_running(tx, taken, worker_id, lease_seconds)
        claimed = _load(tx, taken)
        begun = {each.job_id for each in claimed}
        note_started(tx, sorted(job.job_id for job in jobs if not job.turn and job.job_id in begun))
        return claimed


def _take(tx: Connection, jobs: Sequence[Turn], limit: int, alone: bool) -> list[int]:
    """Ids of the next requests, locked; level after level of priority."""
    taken: list[int] = []
    latest = max((job.turn for job in jobs), default=0)
    for _, level in groupby(jobs, key=lambda job: job.priority):
        within = turns.within_limits(tx, list(level))
        if alone and not taken and (suspect := _suspect(tx, within)) is not None:
            job, request_id = suspect
            turns.served(tx, [job], latest)
            return [request_id]
        share = turns.share(tx, within, limit, first=not taken)
        turns.served(tx, share.jobs, latest)
        taken += share.request_ids
        limit = share.limit
        latest += len(share.jobs)
        if limit < 1:
            break
    return taken


def _suspect(tx: Connection, jobs: Sequence[Turn]) -> tuple[Turn, int] | None:
    """The first suspect of the job whose turn it is, locked; the poisonous on the way fail."""
    for job in jobs:
        while (row := turns.next_suspect(tx, job)) is not None:
            if row.counting < MAX_IDLE_ATTEMPTS:
                return job, row.id
            _fail_poison(tx, row.id)
    return None


def _fail_poison(tx: Connection, request_id: int) -> None:
    tx.execute(
        update(RequestRow)
        .where(RequestRow.id == request_id)
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
            JobRow.kind,
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
            kind=row.kind,
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
