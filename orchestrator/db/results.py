"""What completions hold: chunks as they arrive, finished requests streamed, texts yet to be graded.

Long reads go page by page, each in a transaction of its own, so that an export of any size holds
neither memory nor, on SQLite, the write-ahead log. Knows nothing of files or of the API's shapes.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, func, or_, select

from orchestrator.db.database import Database
from orchestrator.db.tables import (
    CANCELLED,
    FAILED,
    JOB,
    SUCCEEDED,
    ChoiceRow,
    ChunkRow,
    ItemRow,
    JobRow,
    PointRow,
    RequestRow,
    ScoreRow,
    UsageRow,
)
from orchestrator.spec.chunks import StoredChunk

PAGE = 200


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """One completion; `text` is None while it is unfinished, `chunks` go on to its last token."""

    choice: int
    n_tokens: int
    finish_reason: str | None
    text: str | None
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """A request's tokens over all attempts: the prompt once, what was replayed apart."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    replayed_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """One request that has ended, with all that an export says of it.

    `error` is (code, message) of a failed one. `usage` is None if nothing was ever generated.
    `scores`: grader -> choice -> score.
    """

    request_id: int
    job_id: str
    job_name: str
    model: str
    params: Mapping[str, object]
    state: str
    seed: int
    created: int
    system_fingerprint: str | None
    error: tuple[str, str] | None
    item_position: int
    custom_id: str
    columns: Mapping[str, object]
    point_position: int
    point_params: Mapping[str, object]
    finished_at: datetime | None
    choices: tuple[ChoiceResult, ...]
    usage: UsageTotal | None
    scores: Mapping[str, Mapping[int, float]]
    user: str | None = None
    warnings: tuple[str, ...] = ()
    kind: str = JOB

    @property
    def verbatim(self) -> bool:
        """`columns` are the request's whole parameters."""
        return self.kind != JOB


@dataclass(frozen=True, slots=True)
class Ungraded:
    """A finished text and the graders, of those asked for, that have not scored it."""

    request_id: int
    choice: int
    text: str
    columns: Mapping[str, object]
    graders: tuple[str, ...]


def chunks_after(
    db: Database, request_id: int, seen: Mapping[int, int] | None = None
) -> list[StoredChunk]:
    """The request's chunks not seen yet, in the order in which they were stored.

    `seen`: choice -> `token_start` of the last chunk seen of it; a choice not in it starts anew.
    """
    begins = [
        (ChunkRow.choice == choice) & (ChunkRow.token_start <= token_start)
        for choice, token_start in (seen or {}).items()
    ]
    with db.read() as rows:
        return _chunks(rows, [request_id], ~or_(*begins) if begins else None)[request_id]


def choices(db: Database, request_id: int) -> list[ChoiceResult]:
    """The request's choices with their chunks, in order; empty if there is no such request."""
    with db.read() as rows:
        return _choices(rows, [request_id])[request_id]


def results(
    db: Database, job_id: str, *, user: str | None = None, page: int = PAGE
) -> Iterator[Result]:
    """The job's ended requests (succeeded, failed or cancelled) in order of item and point.

    With `user` only those whose parameter `user` is exactly that.
    """
    after = -1
    while True:
        with db.read() as rows:
            found = _result_page(rows, job_id, user, after, page)
        yield from found
        if len(found) < page:
            return
        after = found[-1].request_id


def results_by_id(db: Database, ids: Sequence[int]) -> list[Result]:
    """These requests, whatever their state, in the order of `ids`; those that are not are left out.

    What has not ended holds what it has so far.
    """
    with db.read() as rows:
        found = _filled(rows, _wanted().where(RequestRow.id.in_(ids)))
    by_id = {result.request_id: result for result in found}
    return [by_id[request_id] for request_id in ids if request_id in by_id]


def ungraded(
    db: Database, job_id: str, graders: Sequence[str], *, page: int = PAGE
) -> Iterator[Ungraded]:
    """Finished choices of succeeded requests that lack a score of one of these graders."""
    after = -1
    while graders:
        with db.read() as rows:
            ids, found = _ungraded_page(rows, job_id, tuple(graders), after, page)
        yield from found
        if len(ids) < page:
            return
        after = ids[-1]


def _result_page(
    rows: Connection, job_id: str, user: str | None, after: int, page: int
) -> list[Result]:
    wanted = (
        _wanted()
        .where(
            RequestRow.job_id == job_id,
            RequestRow.state.in_([SUCCEEDED, FAILED, CANCELLED]),
            RequestRow.id > after,
        )
        .order_by(RequestRow.id)
        .limit(page)
    )
    if user is not None:
        wanted = wanted.where(RequestRow.end_user == user)
    return _filled(rows, wanted)


def _wanted() -> Select[*tuple[Any, ...]]:
    return (
        select(
            RequestRow.id,
            RequestRow.job_id,
            RequestRow.state,
            RequestRow.seed,
            RequestRow.created_at,
            RequestRow.finished_at,
            RequestRow.system_fingerprint,
            RequestRow.error_code,
            RequestRow.error_message,
            RequestRow.end_user,
            RequestRow.warnings,
            JobRow.name.label("job_name"),
            JobRow.model,
            JobRow.kind,
            JobRow.spec,
            ItemRow.position.label("item_position"),
            ItemRow.custom_id,
            ItemRow.columns.label("item_columns"),
            PointRow.position.label("point_position"),
            PointRow.params.label("point_params"),
        )
        .join(JobRow, JobRow.id == RequestRow.job_id)
        .join(ItemRow, ItemRow.id == RequestRow.item_id)
        .join(PointRow, PointRow.id == RequestRow.point_id)
    )


def _filled(rows: Connection, wanted: Select[*tuple[Any, ...]]) -> list[Result]:
    found = rows.execute(wanted).all()
    ids = [row.id for row in found]
    choices, usage, scores = _choices(rows, ids), _usage(rows, ids), _scores(rows, ids)
    return [_result(row, choices[row.id], usage.get(row.id), scores[row.id]) for row in found]


def _result(
    row: Any,
    choices: list[ChoiceResult],
    usage: UsageTotal | None,
    scores: Mapping[str, Mapping[int, float]],
) -> Result:
    error = (row.error_code, row.error_message or "") if row.error_code is not None else None
    return Result(
        request_id=row.id,
        job_id=row.job_id,
        job_name=row.job_name,
        model=row.model,
        params=row.spec["params"],
        state=row.state,
        seed=row.seed,
        created=int(row.created_at.timestamp()),
        system_fingerprint=row.system_fingerprint,
        error=error,
        item_position=row.item_position,
        custom_id=row.custom_id,
        columns=row.item_columns,
        point_position=row.point_position,
        point_params=row.point_params,
        finished_at=row.finished_at,
        choices=tuple(choices),
        usage=usage,
        scores=scores,
        user=row.end_user,
        warnings=tuple(row.warnings or ()),
        kind=row.kind,
    )


def _chunks(
    rows: Connection, ids: Sequence[int], only: Any = None
) -> defaultdict[int, list[StoredChunk]]:
    stored = select(
        ChunkRow.request_id,
        ChunkRow.choice,
        ChunkRow.token_start,
        ChunkRow.n_tokens,
        ChunkRow.text,
        ChunkRow.logprobs,
        ChunkRow.calls,
    ).where(ChunkRow.request_id.in_(ids))
    if only is not None:
        stored = stored.where(only)
    # What an older version stored has no position.
    order = (ChunkRow.position, ChunkRow.token_start, ChunkRow.choice)
    stored = stored.order_by(ChunkRow.request_id, *order)
    found: defaultdict[int, list[StoredChunk]] = defaultdict(list)
    for row in rows.execute(stored):
        found[row.request_id].append(StoredChunk(*row[1:]))
    return found


def _choices(rows: Connection, ids: Sequence[int]) -> defaultdict[int, list[ChoiceResult]]:
    chunks = _chunks(rows, ids)
    stored = (
        select(
            ChoiceRow.request_id,
            ChoiceRow.choice,
            ChoiceRow.n_tokens,
            ChoiceRow.finish_reason,
            ChoiceRow.text,
        )
        .where(ChoiceRow.request_id.in_(ids))
        .order_by(ChoiceRow.request_id, ChoiceRow.choice)
    )
    found: defaultdict[int, list[ChoiceResult]] = defaultdict(list)
    for request_id, choice, n_tokens, finish_reason, text in rows.execute(stored):
        mine = tuple(chunk for chunk in chunks[request_id] if chunk.choice == choice)
        found[request_id].append(ChoiceResult(choice, n_tokens, finish_reason, text, mine))
    return found


def _usage(rows: Connection, ids: Sequence[int]) -> dict[int, UsageTotal]:
    totals = (
        select(
            UsageRow.request_id,
            func.max(UsageRow.prompt_tokens),
            func.max(UsageRow.cached_tokens),
            func.sum(UsageRow.completion_tokens),
            func.sum(UsageRow.replayed_tokens),
        )
        .where(UsageRow.request_id.in_(ids))
        .group_by(UsageRow.request_id)
    )
    return {row[0]: UsageTotal(*map(int, row[1:])) for row in rows.execute(totals)}


def _scores(rows: Connection, ids: Sequence[int]) -> defaultdict[int, dict[str, dict[int, float]]]:
    stored = (
        select(ScoreRow.request_id, ScoreRow.grader, ScoreRow.choice, ScoreRow.score)
        .where(ScoreRow.request_id.in_(ids))
        .order_by(ScoreRow.request_id, ScoreRow.grader, ScoreRow.choice)
    )
    found: defaultdict[int, dict[str, dict[int, float]]] = defaultdict(dict)
    for request_id, grader, choice, score in rows.execute(stored):
        found[request_id].setdefault(grader, {})[choice] = score
    return found


def _ungraded_page(
    rows: Connection, job_id: str, graders: tuple[str, ...], after: int, page: int
) -> tuple[list[int], list[Ungraded]]:
    """A page of succeeded requests with fewer scores than choices * graders, and their gaps."""
    scored = (
        select(func.count())
        .where(ScoreRow.request_id == RequestRow.id, ScoreRow.grader.in_(graders))
        .scalar_subquery()
    )
    wanted = (
        select(RequestRow.id, ItemRow.columns)
        .join(ItemRow, ItemRow.id == RequestRow.item_id)
        .where(
            RequestRow.job_id == job_id,
            RequestRow.state == SUCCEEDED,
            RequestRow.id > after,
            scored < RequestRow.n * len(graders),
        )
        .order_by(RequestRow.id)
        .limit(page)
    )
    columns = {row[0]: row[1] for row in rows.execute(wanted)}
    ids = list(columns)
    scores = _scores(rows, ids)
    texts = (
        select(ChoiceRow.request_id, ChoiceRow.choice, ChoiceRow.text)
        .where(ChoiceRow.request_id.in_(ids), ChoiceRow.text.is_not(None))
        .order_by(ChoiceRow.request_id, ChoiceRow.choice)
    )
    found = []
    for request_id, choice, text in rows.execute(texts):
        done = scores[request_id]
        missing = tuple(name for name in graders if choice not in done.get(name, {}))
        if missing:
            found.append(Ungraded(request_id, choice, text or "", columns[request_id], missing))
    return ids, found
