"""One request, ended or not: what it was asked, what it has cost, and a few of its choices.

A request may have 128 choices of thousands of tokens, each with twenty alternatives: whoever shows
it takes the part that fits on a screen. Knows nothing of templates nor of how a request is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from orchestrator.db.database import Database
from orchestrator.db.results import UsageTotal
from orchestrator.db.tables import (
    JOB,
    ChoiceRow,
    ChunkRow,
    ItemRow,
    JobRow,
    PointRow,
    RequestRow,
    ScoreRow,
    UsageRow,
)
from orchestrator.errors import NotFound
from orchestrator.spec.chunks import Json, StoredChunk


@dataclass(frozen=True, slots=True)
class Asked:
    """What `resolve` needs; `usage` is None until something was generated.

    `scores`: (choice, grader, score), in order.
    """

    kind: str
    job_params: Mapping[str, object]
    point_params: Mapping[str, object]
    columns: Mapping[str, object]
    warnings: Sequence[str]
    usage: UsageTotal | None
    scores: Sequence[tuple[int, str, float]]

    @property
    def verbatim(self) -> bool:
        """The item's columns are the whole parameters."""
        return self.kind != JOB


@dataclass(frozen=True, slots=True)
class Said:
    """One choice so far; its chunks in order, without log-probs."""

    choice: int
    n_tokens: int
    finish_reason: str | None
    chunks: Sequence[StoredChunk]


def asked(db: Database, request_id: int) -> Asked:
    """The request's own question. Raises NotFound."""
    wanted = (
        select(
            JobRow.kind,
            JobRow.spec["params"].label("job_params"),
            PointRow.params,
            ItemRow.columns.label("item_columns"),
            RequestRow.warnings,
        )
        .join(JobRow, JobRow.id == RequestRow.job_id)
        .join(PointRow, PointRow.id == RequestRow.point_id)
        .join(ItemRow, ItemRow.id == RequestRow.item_id)
        .where(RequestRow.id == request_id, JobRow.planned_at.is_not(None))
    )
    spent = select(
        func.max(UsageRow.prompt_tokens),
        func.max(UsageRow.cached_tokens),
        func.sum(UsageRow.completion_tokens),
        func.sum(UsageRow.replayed_tokens),
    ).where(UsageRow.request_id == request_id)
    scored = (
        select(ScoreRow.choice, ScoreRow.grader, ScoreRow.score)
        .where(ScoreRow.request_id == request_id)
        .order_by(ScoreRow.choice, ScoreRow.grader)
    )
    with db.read() as rows:
        row = rows.execute(wanted).one_or_none()
        sums = rows.execute(spent).one()
        scores = rows.execute(scored).all()
    if row is None:
        raise NotFound("request", str(request_id))
    usage = None if sums[0] is None else UsageTotal(*map(int, sums))
    found = [(choice, grader, score) for choice, grader, score in scores]
    return Asked(
        row.kind,
        row.job_params,
        row.params,
        row.item_columns,
        row.warnings or (),
        usage,
        found,
    )


def said(db: Database, request_id: int, *, first: int = 0, limit: int = 8) -> list[Said]:
    """The request's choices from `first` on, `limit` at most, as far as they are."""
    ours = (ChoiceRow.request_id == request_id, ChoiceRow.choice >= first)
    found = (
        select(ChoiceRow.choice, ChoiceRow.n_tokens, ChoiceRow.finish_reason)
        .where(*ours, ChoiceRow.choice < first + limit)
        .order_by(ChoiceRow.choice)
    )
    stored = (
        select(
            ChunkRow.choice, ChunkRow.token_start, ChunkRow.n_tokens, ChunkRow.text, ChunkRow.calls
        )
        .where(ChunkRow.request_id == request_id)
        .where(ChunkRow.choice >= first, ChunkRow.choice < first + limit)
        .order_by(ChunkRow.choice, ChunkRow.token_start)
    )
    with db.read() as rows:
        choices = rows.execute(found).all()
        chunks: dict[int, list[StoredChunk]] = {row.choice: [] for row in choices}
        for row in rows.execute(stored):
            if row.choice in chunks:
                chunks[row.choice].append(StoredChunk(*row[:4], calls=row.calls))
    return [Said(*row, chunks[row.choice]) for row in choices]


def entries(db: Database, request_id: int, choice: int, start: int, limit: int) -> list[Json]:
    """The log-prob entries of the choice's tokens from `start` on; empty where none are kept."""
    stored = (
        select(ChunkRow.token_start, ChunkRow.logprobs)
        .where(ChunkRow.request_id == request_id, ChunkRow.choice == choice)
        .where(ChunkRow.token_start < start + limit)
        .where(ChunkRow.token_start + ChunkRow.n_tokens > start)
        .order_by(ChunkRow.token_start)
    )
    found: list[Json] = []
    with db.read() as rows:
        for row in rows.execute(stored):
            kept = row.logprobs or []
            found += kept[max(0, start - row.token_start) : start + limit - row.token_start]
    return found
