"""One request as a stream of chunks, also while it runs: its envelope, and what is new of it.

Knows nothing of who reads the stream, nor of how long they wait for more.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Select, func, select

from orchestrator.db.database import Database
from orchestrator.db.results import chunks_after
from orchestrator.db.tables import (
    JOB,
    ChoiceRow,
    ItemRow,
    JobRow,
    PointRow,
    RequestRow,
    UsageRow,
)
from orchestrator.errors import NotFound
from orchestrator.spec.chunks import ChoiceEnd, Envelope, Json, StoredChunk, completion_id, usage
from orchestrator.spec.plan import given


@dataclass(frozen=True, slots=True)
class News:
    """What was stored since the last look; every end's chunks are in this look or an earlier one.

    `usage` is the API's object, None before the first flush.
    """

    state: str
    chunks: tuple[StoredChunk, ...]
    ends: tuple[ChoiceEnd, ...]
    usage: Json | None


def envelope(db: Database, request_id: int) -> Envelope:
    """What every chunk of the request repeats. Raises NotFound.

    `system_fingerprint` is None until the first flush of the request.
    """
    wanted = (
        select(
            RequestRow.job_id,
            RequestRow.created_at,
            RequestRow.system_fingerprint,
            RequestRow.warnings,
            JobRow.model,
            JobRow.kind,
            JobRow.spec,
            PointRow.params,
            ItemRow.columns.label("item_columns"),
        )
        .join(JobRow, JobRow.id == RequestRow.job_id)
        .join(PointRow, PointRow.id == RequestRow.point_id)
        .join(ItemRow, ItemRow.id == RequestRow.item_id)
        .where(RequestRow.id == request_id, JobRow.planned_at.is_not(None))
    )
    with db.read() as rows:
        row = rows.execute(wanted).one_or_none()
    if row is None:
        raise NotFound("request", str(request_id))
    return envelope_of(
        request_id,
        job_id=row.job_id,
        created=int(row.created_at.timestamp()),
        model=row.model,
        params=given(_params(row.spec), row.params, row.item_columns, verbatim=row.kind != JOB),
        system_fingerprint=row.system_fingerprint,
        warnings=tuple(row.warnings or ()),
    )


def envelope_of(
    request_id: int,
    *,
    job_id: str,
    created: int,
    model: str,
    params: Mapping[str, object],
    system_fingerprint: str | None,
    warnings: tuple[str, ...] = (),
) -> Envelope:
    """The envelope of a request from its rows; `params` as `spec.plan.given` has them."""
    tier = params.get("service_tier")
    options = params.get("stream_options")
    return Envelope(
        id=completion_id(request_id, job_id),
        created=created,
        model=model,
        system_fingerprint=system_fingerprint,
        service_tier=tier if isinstance(tier, str) else None,
        include_usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
        logprobs=bool(params.get("logprobs")),
        calls="function" if params.get("functions") else "tools",
        warnings=warnings,
    )


def news(db: Database, request_id: int, seen: Mapping[int, int]) -> News:
    """What the request has beyond `seen` (choice -> `token_start` of its last chunk seen)."""
    ended = select(ChoiceRow.choice, ChoiceRow.finish_reason).where(
        ChoiceRow.request_id == request_id, ChoiceRow.finish_reason.is_not(None)
    )
    with db.read() as rows:
        state = rows.scalars(select(RequestRow.state).where(RequestRow.id == request_id)).one()
        found = rows.execute(ended.order_by(ChoiceRow.choice)).all()
        spent = rows.execute(_spent(request_id)).one()
    ends = tuple(ChoiceEnd(choice, reason) for choice, reason in found if reason is not None)
    # Read after the ends: whatever has ended then has all its chunks here.
    chunks = tuple(chunks_after(db, request_id, seen))
    known = None if spent[0] is None else usage(*map(int, spent))
    return News(state, chunks, ends, known)


def _spent(request_id: int) -> Select[int, int, int]:
    return select(
        func.max(UsageRow.prompt_tokens),
        func.sum(UsageRow.completion_tokens),
        func.max(UsageRow.cached_tokens),
    ).where(UsageRow.request_id == request_id)


def _params(spec: Mapping[str, object]) -> Mapping[str, object]:
    params = spec["params"]
    return params if isinstance(params, Mapping) else {}
