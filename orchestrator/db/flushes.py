"""What the engine produced -> chunks, counters, states: one fenced transaction for all slots.

The fence: the request still runs under the epoch of the claim, and each choice still holds as many
tokens as the write begins at. What does not pass is not written at all and comes back as lost.
A write that the database holds already (the answer to its COMMIT was lost) passes and is not
written twice, so that after any error the same writes can simply be flushed again.

Knows nothing of slots, samplers or how tokens become text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from sqlalchemy import Connection, bindparam, insert, or_, select, update

from orchestrator.db import renewals
from orchestrator.db.claims import TOKEN_TYPE
from orchestrator.db.database import Database
from orchestrator.db.releases import release
from orchestrator.db.tables import RUNNING, ChoiceRow, ChunkRow, JobRow, RequestRow
from orchestrator.db.writes import ChunkWrite, Flushed, RequestWrite, UsageWrite


def flush(db: Database, writes: Sequence[RequestWrite], *, lease_seconds: float) -> Flushed:
    """Write all of it in one transaction and renew the leases; see the module's first lines.

    Raises WorkerError when the database cannot be reached; flush the same writes again then.
    """
    if not writes:
        return Flushed(frozenset(), frozenset())
    with db.write() as tx:
        held = _held(tx, writes)
        new = {w.request_id: part for w in writes if (part := _unwritten(w, held)) is not None}
        running = [w for w in new.values() if held[w.request_id].state == RUNNING]
        _write(tx, running, held, lease_seconds)
    lost = frozenset(w.request_id for w in writes if w.request_id not in new)
    stopped = [w for w in new.values() if w.outcome is None and held[w.request_id].stopped]
    release(db, [(w.request_id, w.epoch) for w in stopped])
    return Flushed(lost, frozenset(w.request_id for w in stopped))


@dataclass(slots=True)
class _Held:
    """What the database holds of one request, its row locked."""

    epoch: int
    state: str
    stopped: bool
    ends: dict[int, str | None] = field(default_factory=dict)
    n_tokens: dict[int, int] = field(default_factory=dict)
    chunks: dict[tuple[int, int], tuple[bytes, str]] = field(default_factory=dict)


def _held(tx: Connection, writes: Sequence[RequestWrite]) -> dict[int, _Held]:
    ids = sorted(w.request_id for w in writes)
    held = {
        row.id: _Held(row.epoch, row.state, bool(row.stopped))
        for row in tx.execute(_REQUESTS, {"ids": ids})
    }
    for request_id, choice, n_tokens, finish_reason in tx.execute(_CHOICES, {"ids": list(held)}):
        held[request_id].n_tokens[choice] = n_tokens
        held[request_id].ends[choice] = finish_reason
    doubtful = [w for w in writes if w.request_id in held and _doubtful(w, held[w.request_id])]
    if doubtful:
        _read_back(tx, doubtful, held)
    return held


def _doubtful(write: RequestWrite, held: _Held) -> bool:
    """Whether the write may be there already: it begins before the end, or adds no tokens."""
    return any(
        chunk.token_start < held.n_tokens.get(chunk.choice, 0) or not len(chunk.token_ids)
        for chunk in write.chunks
    )


def _read_back(tx: Connection, writes: Sequence[RequestWrite], held: Mapping[int, _Held]) -> None:
    first = min(chunk.token_start for write in writes for chunk in write.chunks)
    chunks = select(
        ChunkRow.request_id,
        ChunkRow.choice,
        ChunkRow.token_start,
        ChunkRow.token_ids,
        ChunkRow.text,
    ).where(ChunkRow.request_id.in_([w.request_id for w in writes]), ChunkRow.token_start >= first)
    for request_id, choice, token_start, token_ids, words in tx.execute(chunks):
        held[request_id].chunks[choice, token_start] = (token_ids, words)


def _blob(chunk: ChunkWrite) -> bytes:
    return np.ascontiguousarray(chunk.token_ids, TOKEN_TYPE).tobytes()


def _unwritten(write: RequestWrite, held_by_id: Mapping[int, _Held]) -> RequestWrite | None:
    """The part of the write that is not in the database yet; None when the claim is lost."""
    held = held_by_id.get(write.request_id)
    if held is None or held.epoch != write.epoch:
        return None
    chunks: list[ChunkWrite] = []
    n_tokens = dict(held.n_tokens)
    for chunk in write.chunks:
        stored = held.chunks.get((chunk.choice, chunk.token_start))
        if stored is not None and stored[0] == _blob(chunk):
            continue
        ended = held.ends.get(chunk.choice) is not None
        if stored is not None or ended or n_tokens.get(chunk.choice) != chunk.token_start:
            return None
        n_tokens[chunk.choice] += len(chunk.token_ids)
        chunks.append(chunk)
    ends = [end for end in write.ends if held.ends.get(end.choice) != end.finish_reason]
    if any(held.ends.get(end.choice, "") is not None for end in ends):
        return None
    if held.state == RUNNING:
        return replace(write, chunks=tuple(chunks), ends=tuple(ends))
    # Not running, yet under our epoch: ours only if the write that ended it was this one.
    return write if held.state == write.outcome and not chunks and not ends else None


def _write(
    tx: Connection, parts: Sequence[RequestWrite], held: Mapping[int, _Held], lease_seconds: float
) -> None:
    """Insert and update what passed the fence; each table in one statement."""
    chunks = [row for part in parts for row in _chunk_values(part, held[part.request_id])]
    if chunks:
        tx.execute(insert(ChunkRow), chunks)
    choices = [row for part in parts for row in _choice_values(part, held[part.request_id])]
    if choices:
        tx.execute(_CHOICE, choices)
    requests = [(part, _request_values(part, held[part.request_id])) for part in parts]
    going_on = [row for part, row in requests if part.outcome is None]
    renewals.renew(tx, going_on, lease_seconds)
    renewals.finish(tx, [row | _outcome(p) for p, row in requests if p.outcome is not None])
    renewals.spend(tx, [_usage_values(p, p.usage) for p in parts if p.usage is not None])


def _chunk_values(part: RequestWrite, held: _Held) -> list[dict[str, object]]:
    # A chunk without tokens comes with its choice's end: so every position is above those before.
    position = sum(held.n_tokens.values()) + sum(end is not None for end in held.ends.values())
    rows: list[dict[str, object]] = []
    for chunk in part.chunks:
        rows.append(_chunk_row(part.request_id, chunk) | {"position": position})
        position += max(len(chunk.token_ids), 1)
    return rows


def _chunk_row(request_id: int, chunk: ChunkWrite) -> dict[str, object]:
    return {
        "request_id": request_id,
        "choice": chunk.choice,
        "token_start": chunk.token_start,
        "n_tokens": len(chunk.token_ids),
        "token_ids": _blob(chunk),
        "text": chunk.text,
        "logprobs": chunk.logprobs if chunk.logprobs is None else list(chunk.logprobs),
        "calls": chunk.calls if chunk.calls is None else list(chunk.calls),
    }


def _choice_values(part: RequestWrite, held: _Held) -> list[dict[str, object]]:
    touched = {chunk.choice for chunk in part.chunks} | {end.choice for end in part.ends}
    ends = {end.choice: end for end in part.ends}
    rows: list[dict[str, object]] = []
    for choice in sorted(touched):
        new = sum(len(chunk.token_ids) for chunk in part.chunks if chunk.choice == choice)
        end = ends.get(choice)
        rows.append(
            {
                "b_request_id": part.request_id,
                "b_choice": choice,
                "b_n_tokens": held.n_tokens[choice] + new,
                "b_finish_reason": end.finish_reason if end else None,
                "b_text": end.text if end else None,
            }
        )
    return rows


def _request_values(part: RequestWrite, held: _Held) -> dict[str, object]:
    # Whoever stored the first tokens, or an end without any, has said it for all that come: a
    # replay repeats it.
    first = not any(held.n_tokens.values()) and not any(held.ends.values())
    return {
        "b_id": part.request_id,
        "b_idle": _idle_attempts(part),
        "b_fresh": any(len(chunk.token_ids) for chunk in part.chunks),
        "b_fingerprint": part.system_fingerprint if first else None,
        "b_warnings": (list(part.warnings) or None) if first else None,
    }


def _idle_attempts(part: RequestWrite) -> int | None:
    """None leaves the count as it is; an absolute number, since a flush may be repeated."""
    if any(len(chunk.token_ids) for chunk in part.chunks):
        return 0
    if part.idle_attempts is None:
        return None
    return max(part.idle_attempts - 1, 0) if part.waiting else part.idle_attempts


def _outcome(part: RequestWrite) -> dict[str, object]:
    code, message = part.error or (None, None)
    return {"b_state": part.outcome, "b_code": code, "b_message": message}


def _usage_values(part: RequestWrite, usage: UsageWrite) -> dict[str, object]:
    return {
        "request_id": part.request_id,
        "attempt": part.attempt,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "replayed_tokens": usage.replayed_tokens,
    }


# Built once: a flush comes four times a second.
_REQUESTS = (
    select(
        RequestRow.id,
        RequestRow.epoch,
        RequestRow.state,
        or_(JobRow.cancelled_at.is_not(None), JobRow.paused_at.is_not(None)).label("stopped"),
    )
    .join(JobRow, JobRow.id == RequestRow.job_id)
    .where(RequestRow.id.in_(bindparam("ids", expanding=True)))
    .order_by(RequestRow.id)
    .with_for_update(of=RequestRow)
)
_CHOICES = select(
    ChoiceRow.request_id, ChoiceRow.choice, ChoiceRow.n_tokens, ChoiceRow.finish_reason
).where(ChoiceRow.request_id.in_(bindparam("ids", expanding=True)))
_CHOICE = (
    update(ChoiceRow)
    .where(
        ChoiceRow.request_id == bindparam("b_request_id"),
        ChoiceRow.choice == bindparam("b_choice"),
    )
    .values(
        n_tokens=bindparam("b_n_tokens"),
        finish_reason=bindparam("b_finish_reason"),
        text=bindparam("b_text"),
    )
)
