"""What is new of many requests at once, for all who follow one: a query per table, not per reader.

Says the same as `replay.news` says of one request; and a request's chunks as they lie, from a
position on. Knows nothing of threads or of who reads.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Integer, Select, bindparam, column, func, select, values

from orchestrator.db.columns import Id
from orchestrator.db.database import Database
from orchestrator.db.replay import News
from orchestrator.db.tables import ChoiceRow, ChunkRow, RequestRow, UsageRow
from orchestrator.errors import NotFound
from orchestrator.spec.chunks import ChoiceEnd, Json, StoredChunk, usage

_AT_ONCE = 500
"""Rows of a VALUES list: three bound values each, far below what a database takes."""


@dataclass(slots=True)
class Place:
    """How far one reader has read one request.

    `seen`: choice -> `token_start` of the last chunk seen of it; `counted`: choice -> tokens up to
    that chunk's end, unknown to a reader who begins in the middle; `ended`: choices at their end.
    """

    request_id: int
    seen: dict[int, int]
    counted: dict[int, int] = field(default_factory=dict)
    ended: frozenset[int] = frozenset()
    state: str | None = None

    def after(self, news: News) -> "Place":
        """The place when the news have been read."""
        seen, counted = dict(self.seen), dict(self.counted)
        for chunk in news.chunks:
            seen[chunk.choice] = chunk.token_start
            counted[chunk.choice] = chunk.token_start + chunk.n_tokens
        ended = frozenset(end.choice for end in news.ends)
        return Place(self.request_id, seen, counted, ended, news.state)


@dataclass(slots=True)
class _Known:
    """What the rows of requests and choices say of one request."""

    state: str
    n_tokens: dict[int, int] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """One stored chunk and where it stands; `token_ids`: little-endian int32."""

    position: int
    choice: int
    token_start: int
    n_tokens: int
    token_ids: bytes
    text: str
    logprobs: list[Json] | None
    calls: list[Json] | None
    created_at: datetime


def chunks_page(
    db: Database, request_id: int, *, after: int = -1, limit: int = 100
) -> list[PlacedChunk]:
    """The request's chunks after a position, in the order in which they were stored."""
    columns = [getattr(ChunkRow, name) for name in PlacedChunk.__dataclass_fields__]
    wanted = select(*columns).where(ChunkRow.request_id == request_id, ChunkRow.position > after)
    order = (ChunkRow.position, ChunkRow.token_start, ChunkRow.choice)
    with db.read() as rows:
        found = rows.execute(wanted.order_by(*order).limit(limit)).all()
    return [PlacedChunk(*row) for row in found]


def look(db: Database, places: Sequence[Place]) -> list[News | NotFound | None]:
    """What each reader has not read yet, in the order of `places`; None where that is nothing.

    The first look of a reader is always news; NotFound in place of a request that is not there.
    """
    ids = sorted({place.request_id for place in places})
    with db.read() as rows:
        known = _known(rows, ids)
        # Read after the ends: whatever has ended then has all its chunks here.
        moved = [place for place in places if _has_moved(place, known.get(place.request_id))]
        chunks = _chunks(rows, _begins(moved, known))
        spent = _spent(rows, sorted({place.request_id for place in moved}))
    found: list[News | NotFound | None] = []
    for place in places:
        mine = known.get(place.request_id)
        if mine is None:
            found.append(NotFound("request", str(place.request_id)))
        elif not _has_moved(place, mine):
            found.append(None)
        else:
            found.append(_news(place, mine, chunks[place.request_id], spent.get(place.request_id)))
    return found


def _news(place: Place, known: _Known, chunks: Sequence[StoredChunk], spent: Json | None) -> News:
    unread = tuple(
        chunk for chunk in chunks if chunk.token_start > place.seen.get(chunk.choice, -1)
    )
    ends = tuple(ChoiceEnd(choice, known.ends[choice]) for choice in sorted(known.ends))
    return News(known.state, unread, ends, spent)


def _has_moved(place: Place, known: _Known | None) -> bool:
    return known is not None and (
        place.state != known.state
        or len(place.ended) != len(known.ends)
        or any(place.counted.get(choice, 0) < n for choice, n in known.n_tokens.items())
    )


def _begins(places: Sequence[Place], known: Mapping[int, _Known]) -> dict[tuple[int, int], int]:
    """(request, choice) -> the least `token_start` that one of its readers has seen."""
    begins: dict[tuple[int, int], int] = {}
    for place in places:
        for choice, n_tokens in known[place.request_id].n_tokens.items():
            counted = place.counted.get(choice, -1)
            if counted < n_tokens or choice not in place.ended:
                key, seen = (place.request_id, choice), place.seen.get(choice, -1)
                begins[key] = min(seen, begins.get(key, seen))
    return begins


def _known(rows: Connection, ids: Sequence[int]) -> dict[int, _Known]:
    known = {row.id: _Known(row.state) for row in rows.execute(_STATES, {"ids": ids})}
    for request_id, choice, n_tokens, reason in rows.execute(_CHOICES, {"ids": list(known)}):
        known[request_id].n_tokens[choice] = n_tokens
        if reason is not None:
            known[request_id].ends[choice] = reason
    return known


def _chunks(
    rows: Connection, begins: Mapping[tuple[int, int], int]
) -> defaultdict[int, list[StoredChunk]]:
    found: defaultdict[int, list[tuple[int, StoredChunk]]] = defaultdict(list)
    wanted = [(*key, seen) for key, seen in sorted(begins.items())]
    for start in range(0, len(wanted), _AT_ONCE):
        for row in rows.execute(_after(wanted[start : start + _AT_ONCE])):
            found[row.request_id].append((row.position, StoredChunk(*row[2:])))
    # In the order of storing, as everywhere; what an older version stored has no position.
    in_order: defaultdict[int, list[StoredChunk]] = defaultdict(list)
    for request_id, placed in found.items():
        placed.sort(key=lambda each: (each[0], each[1].token_start, each[1].choice))
        in_order[request_id] = [chunk for _, chunk in placed]
    return in_order


def _after(wanted: Sequence[tuple[int, int, int]]) -> Select[*tuple[Any, ...]]:
    names = (column("request_id", Id), column("choice", Integer), column("seen", Integer))
    begins = values(*names, name="begins").data(list(wanted)).cte("begins")
    return select(
        ChunkRow.request_id,
        ChunkRow.position,
        ChunkRow.choice,
        ChunkRow.token_start,
        ChunkRow.n_tokens,
        ChunkRow.text,
        ChunkRow.logprobs,
        ChunkRow.calls,
    ).join_from(
        begins,
        ChunkRow,
        (ChunkRow.request_id == begins.c.request_id)
        & (ChunkRow.choice == begins.c.choice)
        & (ChunkRow.token_start > begins.c.seen),
    )


def _spent(rows: Connection, ids: Sequence[int]) -> dict[int, Json]:
    return {row[0]: usage(*map(int, row[1:])) for row in rows.execute(_USAGE, {"ids": ids})}


# Built once: a look comes many times a second.
_STATES = select(RequestRow.id, RequestRow.state).where(
    RequestRow.id.in_(bindparam("ids", expanding=True))
)
_CHOICES = select(
    ChoiceRow.request_id, ChoiceRow.choice, ChoiceRow.n_tokens, ChoiceRow.finish_reason
).where(ChoiceRow.request_id.in_(bindparam("ids", expanding=True)))
_USAGE = (
    select(
        UsageRow.request_id,
        func.max(UsageRow.prompt_tokens),
        func.sum(UsageRow.completion_tokens),
        func.max(UsageRow.cached_tokens),
    )
    .where(UsageRow.request_id.in_(bindparam("ids", expanding=True)))
    .group_by(UsageRow.request_id)
)
