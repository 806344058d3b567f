"""Reading on until it is at its end: a job's status, a request's text or chunks.

Polls the rows, as every reader may; knows nothing of who writes them or of how they are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.db.replay import News, envelope, news
from orchestrator.db.views import JobStatus
from orchestrator.spec.chunks import ChoiceEnd, Json, StoredChunk, stream

POLL_SECONDS = 0.3
# A status that takes long to count is asked for less often: at most 5 % of the time goes there.
_POLL_SHARE = 0.05
ENDED = frozenset({"succeeded", "failed", "cancelled", "partial"})
_ENDED_REQUEST = frozenset({"succeeded", "failed", "cancelled"})


def follow_job(
    db: Database, job_id: str, shown: Callable[[JobStatus], None], check: Callable[[], None]
) -> JobStatus:
    """The job's status when it has ended or was paused; `shown` gets each one on the way.

    `check` is called between two looks and may raise, to end the wait.
    """
    while True:
        began = time.monotonic()
        status = views.job_status(db, job_id)
        took = time.monotonic() - began
        shown(status)
        if status.state in ENDED or status.state == "paused":
            return status
        check()
        time.sleep(max(POLL_SECONDS, took / _POLL_SHARE))


def follow_request(db: Database, request_id: int) -> Iterator[News]:
    """Each look at a request that brought something new, up to the one that finds it ended."""
    seen: dict[int, int] = {}
    while True:
        look = news(db, request_id, seen)
        seen.update((chunk.choice, chunk.token_start) for chunk in look.chunks)
        yield look
        if look.state in _ENDED_REQUEST:
            return
        time.sleep(POLL_SECONDS)


def request_text(db: Database, request_id: int, n: int) -> Iterator[str]:
    """The request's text as it is persisted: choice after choice, with a heading where n > 1.

    Calls come after the text they follow, a line `name(arguments)` each.
    """
    shown = [_Shown() for _ in range(n)]
    current, headed = 0, -1
    for look in follow_request(db, request_id):
        for chunk in look.chunks:
            shown[chunk.choice].add(chunk)
        ended = {end.choice: end.finish_reason for end in look.ends}
        over = look.state in _ENDED_REQUEST
        while current < n:
            if n > 1 and headed < current and (shown[current].pieces or over):
                headed = current
                yield f"--- choice {current}\n"
            yield shown[current].take(ended.get(current))
            if current not in ended and not over:
                break
            yield "\n"
            current += 1


@dataclass(slots=True)
class _Shown:
    """What of one choice is to be shown; `in_call` while its last call is not closed."""

    pieces: list[str] = field(default_factory=list)
    begun: bool = False
    in_call: bool = False

    def add(self, chunk: StoredChunk) -> None:
        if chunk.text:
            self.pieces.append(chunk.text)
        for call in chunk.calls or ():
            if (name := call.get("name")) is not None:
                said = self.begun or bool(self.pieces)
                self.pieces += [")" if self.in_call else "", "\n" if said else "", f"{name}("]
                self.in_call = True
            self.pieces.append(call["arguments"])

    def take(self, finish_reason: str | None) -> str:
        """What is new; a call that was cut off stays open."""
        if self.in_call and finish_reason not in (None, "length"):
            self.pieces.append(")")
        new = "".join(self.pieces)
        self.begun = self.begun or bool(new)
        self.pieces.clear()
        return new


def request_chunks(db: Database, request_id: int) -> Iterator[Json]:
    """The request's `chat.completion.chunk` objects as they come; joined, they fold to the export.

    They are the same objects whenever the request is read, while it runs or after. Waits for
    the first look that finds a chunk, so that the fingerprint is in all of them.
    """
    looks = follow_request(db, request_id)
    last = next(looks)
    while not last.chunks and last.state not in _ENDED_REQUEST:
        last = next(looks)

    def chunks() -> Iterator[StoredChunk]:
        nonlocal last
        yield from last.chunks
        for last in looks:
            yield from last.chunks

    def ends() -> Iterator[ChoiceEnd]:
        yield from last.ends  # asked for when the chunks are at their end

    head = envelope(db, request_id)
    yield from stream(head, chunks(), ends())
    if last.state == "succeeded":
        yield from stream(head, (), (), last.usage)
