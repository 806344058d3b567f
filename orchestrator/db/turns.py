"""Whose turn it is: jobs of one priority share what runs, and none of them starves.

The rule: each next request goes to the job with the fewest running requests; among equals to the
one that was served longest ago, then to the older one. A job at its `max_parallel` is left out.
Inside a job requests come in the order of their ids, so that one item's sweep stays together.

Knows nothing of workers or leases.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from sqlalchemy import (
    CTE,
    Connection,
    Row,
    Select,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
    update,
)

from orchestrator.db.columns import now
from orchestrator.db.tables import (
    CHAT,
    DELAYED,
    READY,
    ROWS_PER_JOB,
    SUSPECT,
    ChoiceRow,
    JobRow,
    RequestRow,
    TurnRow,
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A job with something to claim: how many of its requests run, whether it has suspects.

    `turn` is the higher the later it was served.
    """

    job_id: str
    number: int
    priority: int
    max_parallel: int | None
    turn: int
    running: int
    suspects: bool

    @property
    def room(self) -> float:
        """How many more of its requests may run."""
        return float("inf") if self.max_parallel is None else self.max_parallel - self.running


@dataclass(slots=True)
class Share:
    """What was taken: request ids grouped by job, the jobs by their last turn, the limit left."""

    request_ids: list[int]
    jobs: list[Turn]
    limit: int


def end_delays(tx: Connection) -> None:
    """What waited for its `retry_at` and need not any more is ready, or a suspect, again."""
    due = (
        select(RequestRow.id)
        .where(text(DELAYED), RequestRow.retry_at <= select(now()).scalar_subquery())
        .with_for_update(skip_locked=True)
    )
    tx.execute(update(RequestRow).where(RequestRow.id.in_(due)).values(retry_at=None))


def open_jobs(tx: Connection, model: str, job_id: str | None, *, chats: bool = False) -> list[Turn]:
    """The jobs (or `chats` alone) that a worker of `model` may claim from, in their order.

    By priority, then by whose turn it is.
    """
    only = JobRow.id == job_id if job_id is not None else true()
    kind = JobRow.kind == CHAT if chats else true()
    return [Turn(*row) for row in tx.execute(_OPEN.where(only, kind), {"model": model})]


def within_limits(tx: Connection, jobs: Sequence[Turn]) -> list[Turn]:
    """Those with room; the ones with a `max_parallel` locked and counted anew under the lock."""
    limited = sorted(job.job_id for job in jobs if job.max_parallel is not None)
    if not limited:
        return list(jobs)
    tx.execute(_LOCK, {"ids": limited}).all()
    running = {job_id: count for job_id, count in tx.execute(_RUNNING, {"ids": limited})}
    counted = [
        replace(job, running=running.get(job.job_id, 0)) if job.max_parallel is not None else job
        for job in jobs
    ]
    return [job for job in counted if job.room >= 1]


def next_suspect(tx: Connection, job: Turn) -> Row[Any] | None:
    """The job's first suspect that nobody else is just claiming, locked."""
    if not job.suspects:
        return None
    return tx.execute(_SUSPECT, _place(job, after=-1, limit=1)).one_or_none()


@dataclass(slots=True)
class _Queue:
    """One job's next requests, fetched as needed."""

    job: Turn
    rows: deque[Row[Any]] = field(default_factory=deque)
    after: int = -1
    ended: bool = False
    taken: list[int] = field(default_factory=list)

    def key(self) -> tuple[int, int, int]:
        return (self.job.running + len(self.taken), self.job.turn, self.job.number)

    def fetch(self, tx: Connection, ask: int) -> None:
        self.rows += tx.execute(_READY, _place(self.job, self.after, ask)).all()
        self.ended = len(self.rows) < ask
        if self.rows:
            self.after = self.rows[-1].id

    @property
    def room(self) -> float:
        return self.job.room - len(self.taken)


def share(tx: Connection, jobs: Sequence[Turn], limit: int, *, first: bool) -> Share:
    """Take requests for `limit` choices by the rule; a `first` one may be wider than that."""
    heap = [(queue.key(), queue) for queue in map(_Queue, jobs)]
    heapq.heapify(heap)
    order: dict[str, _Queue] = {}  # by the last turn
    taking: dict[str, _Queue] = {}  # by the first turn
    while heap and limit > 0:
        _, queue = heapq.heappop(heap)
        if not queue.rows and not queue.ended:
            queue.fetch(tx, int(min(ceil(limit / (len(heap) + 1)), queue.room)))
        if not queue.rows:
            continue
        if queue.rows[0].unfinished > limit and (order or not first):
            limit = 0
            break
        row = queue.rows.popleft()
        queue.taken.append(row.id)
        limit -= max(1, row.unfinished)
        order.pop(queue.job.job_id, None)
        order[queue.job.job_id] = queue
        taking[queue.job.job_id] = queue
        if queue.room >= 1:
            heapq.heappush(heap, (queue.key(), queue))
    ids = [request_id for queue in taking.values() for request_id in queue.taken]
    return Share(ids, [queue.job for queue in order.values()], max(limit, 0))


def served(tx: Connection, jobs: Iterable[Turn], latest: int) -> None:
    """Note that these were served, the last one last; a clock that only claims read.

    A row that another claim is just noting is left to it: nobody waits here.
    """
    rows = [
        {"b_job_id": job.job_id, "b_turn": latest + place}
        for place, job in enumerate(jobs, start=1)
    ]
    if rows:
        tx.execute(_SERVED, rows)


def _place(job: Turn, after: int, limit: int) -> dict[str, object]:
    first = job.number * ROWS_PER_JOB
    return {
        "b_job_id": job.job_id,
        "b_after": max(after, first - 1),
        "b_end": first + ROWS_PER_JOB,
        "b_limit": limit,
    }


def _jobs_with(condition: str, name: str) -> CTE:
    """The ids of all jobs that have such a request, by skipping through the index."""
    # Not min(job_id): PostgreSQL may read the whole index for it.
    least = select(RequestRow.job_id).where(text(condition)).order_by(RequestRow.job_id).limit(1)
    found = select(least.scalar_subquery().label("job_id")).cte(name, recursive=True)
    following = least.where(RequestRow.job_id > found.c.job_id).scalar_subquery()
    return found.union_all(select(following).where(found.c.job_id.is_not(None)))


def _waiting(condition: str) -> Select[Any]:
    """The next of a job's requests, locked; SQLite has one writer and renders no lock."""
    unfinished = (
        select(func.count())
        .where(ChoiceRow.request_id == RequestRow.id, ChoiceRow.finish_reason.is_(None))
        .scalar_subquery()
    )
    return (
        select(RequestRow.id, _COUNTING, unfinished.label("unfinished"))
        .where(
            RequestRow.job_id == bindparam("b_job_id"),
            text(condition),
            RequestRow.id > bindparam("b_after"),
            RequestRow.id < bindparam("b_end"),
        )
        .order_by(RequestRow.id)
        .limit(bindparam("b_limit"))
        .with_for_update(skip_locked=True, of=RequestRow)
    )


# Those that may be its own doing.
_COUNTING = (RequestRow.idle_attempts - RequestRow.excused).label("counting")

# Built once: every idle worker asks once a second.
_READY, _SUSPECT = _waiting(READY), _waiting(SUSPECT)
_RUNNING = (
    select(RequestRow.job_id, func.count())
    .where(RequestRow.job_id.in_(bindparam("ids", expanding=True)), text("state = 'running'"))
    .group_by(RequestRow.job_id)
)
_WITH_READY = select(_jobs_with(READY, "with_ready").c.job_id)
_WITH_SUSPECT = select(_jobs_with(SUSPECT, "with_suspect").c.job_id)
_OPEN = (
    select(
        JobRow.id,
        JobRow.number,
        JobRow.priority,
        JobRow.max_parallel,
        TurnRow.turn,
        select(func.count())
        .where(RequestRow.job_id == JobRow.id, text("state = 'running'"))
        .scalar_subquery()
        .label("running"),
        JobRow.id.in_(_WITH_SUSPECT).label("suspects"),
    )
    .join(TurnRow, TurnRow.job_id == JobRow.id)
    .where(
        or_(JobRow.id.in_(_WITH_READY), JobRow.id.in_(_WITH_SUSPECT)),
        JobRow.model == bindparam("model"),
        JobRow.planned_at.is_not(None),
        JobRow.paused_at.is_(None),
        JobRow.cancelled_at.is_(None),
        or_(JobRow.deadline_at.is_(None), JobRow.deadline_at > now()),
    )
    .order_by(JobRow.priority.desc(), literal_column("running"), TurnRow.turn, JobRow.number)
)
_LOCK = (
    select(TurnRow.job_id)
    .where(TurnRow.job_id.in_(bindparam("ids", expanding=True)))
    .order_by(TurnRow.job_id)
    .with_for_update()
)
_FREE = (
    select(TurnRow.job_id)
    .where(TurnRow.job_id == bindparam("b_job_id"))
    .with_for_update(skip_locked=True)
)
_SERVED = (
    update(TurnRow)
    .where(TurnRow.job_id == _FREE.scalar_subquery())
    .values(turn=bindparam("b_turn"))
)
