"""Events to rows: gathers what the engine emits and writes it in fenced flushes.

One flush is one transaction for all requests: chunks, ends, usage, outcomes, renewed leases; the
first tokens of a chat, and what follows them, go ahead in small ones of their own. A request whose
lease was lost, or whose job was cancelled or paused, comes back by id and nothing
more of it is written. Knows nothing of slots, sampling or Celery.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from orchestrator import metrics
from orchestrator.db import store
from orchestrator.db.database import Database
from orchestrator.errors import RequestError, WorkerError
from workers.engine.events import Broken, Event, Failed, Finished, Started, Tokens
from workers.words.text import CallDelta
from workers.words.tokenizer import LogprobEntry

log = logging.getLogger("penstock.recorder")
_RETRY_SECONDS = 0.2


@dataclass(slots=True)
class _Chunk:
    """What one choice emitted since the last flush."""

    start: int
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)


@dataclass(slots=True)
class _Open:
    """A claimed request on its way; `unfinished` holds the indices of its open choices."""

    claimed: store.Claimed
    unfinished: set[int]
    chunks: dict[int, _Chunk] = field(default_factory=dict)
    ends: list[store.ChoiceEnd] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    replayed_tokens: int = 0
    completion_tokens: int = 0
    warnings: tuple[str, ...] = ()
    error: RequestError | None = None
    broken: WorkerError | None = None
    flushed: bool = False
    proven: bool = False  # a token of this attempt is stored

    @property
    def outcome(self) -> str | None:
        if self.error is not None:
            return "failed"
        return None if self.unfinished else "succeeded"

    @property
    def urgent(self) -> bool:
        """Somebody waits for what was gathered since the last flush."""
        if not self.claimed.urgent:
            return False
        return bool(self.chunks) or self.outcome is not None or self.broken is not None


class Recorder:
    """One worker's open requests; the engine's thread owns it."""

    def __init__(
        self,
        db: Database,
        *,
        model: str,
        fingerprint: str,
        lease_seconds: float,
        flush_seconds: float,
        chat_seconds: float = 0.04,
    ) -> None:
        """`flush_seconds`: between two flushes; `chat_seconds`: the same for chats alone."""
        self._db, self._fingerprint = db, fingerprint
        self._lease, self._interval, self._chat_interval = (
            lease_seconds,
            flush_seconds,
            chat_seconds,
        )
        self._model = model
        self._open: dict[int, _Open] = {}
        self._flushed_at = self._chats_at = time.monotonic()
        self.finished_jobs: set[str] = set()
        self.tokens = 0

    @property
    def open(self) -> list[store.Claimed]:
        """What was claimed and is not at its end."""
        return [request.claimed for request in self._open.values()]

    @property
    def has_suspect(self) -> bool:
        """Something open was claimed in vain before, and has not stored one new token since."""
        return any(
            request.claimed.suspect and not request.proven for request in self._open.values()
        )

    @property
    def all_clear(self) -> bool:
        """Nobody would be suspected if this process died now: each has stored a token, or waits."""
        return all(
            request.proven or (request.flushed and not request.prompt_tokens)
            for request in self._open.values()
        )

    @property
    def due(self) -> bool:
        """The flush interval has passed, or a suspect's first tokens wait, and others for it."""
        return self.since_flush >= self._interval or any(
            request.claimed.suspect and not request.proven and request.chunks
            for request in self._open.values()
        )

    @property
    def chats_due(self) -> bool:
        """A chat has something to be flushed: its first tokens now, all else after its interval."""
        passed = time.monotonic() - self._chats_at >= self._chat_interval
        return any(
            request.urgent and (passed or not request.proven) for request in self._open.values()
        )

    @property
    def since_flush(self) -> float:
        """Seconds since the last flush of all began."""
        return time.monotonic() - self._flushed_at

    def holds(self, request_id: int) -> bool:
        """The request is open: claimed, and neither at its end nor lost."""
        return request_id in self._open

    def begin(self, claimed: store.Claimed) -> None:
        """A request was claimed: from now on its lease is renewed by every flush."""
        unfinished = {c.choice for c in claimed.choices if c.finish_reason is None}
        self._open[claimed.request_id] = _Open(claimed, unfinished)

    def record(self, events: Iterable[Event]) -> None:
        """Gather; nothing is written before `flush`."""
        for event in events:
            request = self._open.get(event.id)
            if request is not None:
                self.tokens += _gather(request, event)

    def fail(self, request_id: int, error: RequestError) -> None:
        """The request cannot be admitted."""
        self._open[request_id].error = error

    def flush(self) -> frozenset[int]:
        """Write everything gathered; the ids whose work is to stop (lost, cancelled, paused).

        While the database is away it is tried again until the leases are over, then WorkerError.
        Requests with which steps fail are given back for another attempt, somewhere, later.
        """
        self._flushed_at = self._chats_at = time.monotonic()
        return self._flush(list(self._open.values()))

    def flush_chats(self) -> frozenset[int]:
        """The same for the chats that have something to tell; the others' tokens wait."""
        self._chats_at = time.monotonic()
        return self._flush([request for request in self._open.values() if request.urgent])

    def _flush(self, requests: Sequence[_Open]) -> frozenset[int]:
        if not requests:
            return frozenset()
        began = time.monotonic()
        writes = [self._write(request) for request in requests]
        flushed = self._flush_until(writes, began + self._lease)
        metrics.FLUSH_SECONDS.labels(self._model).observe(time.monotonic() - began)
        gone = flushed.lost | flushed.cancelled
        for write in writes:
            self._settle(write, gone)
        for id in flushed.lost:
            log.warning("request.lost id=%s", id)
        metrics.LOST.labels(self._model).inc(len(flushed.lost))
        for request in requests:
            if request.broken is not None and self.holds(request.claimed.request_id):
                self._give_back([request], request.broken)
        return gone

    def release(self, error: WorkerError | None = None) -> None:
        """Flush, then give every open request back to the queue; no token is lost.

        With an `error` it counts as a failure of each, and their next attempt waits a while.
        """
        self.flush()
        self._give_back(list(self._open.values()), error)

    def forget(self) -> list[tuple[int, int]]:
        """Drop what is open: the leases are over, and whatever was not flushed is computed anew.

        (request_id, epoch) of each.
        """
        pairs = [(each.claimed.request_id, each.claimed.epoch) for each in self._open.values()]
        self._open.clear()
        return pairs

    def _give_back(self, requests: Sequence[_Open], error: WorkerError | None) -> None:
        pairs = [(each.claimed.request_id, each.claimed.epoch) for each in requests]
        why = (error.code, error.message) if error else None
        store.release(self._db, pairs, error=why, delay=error is not None)
        for id, epoch in pairs:
            del self._open[id]
            log.info("request.released id=%s epoch=%s", id, epoch)

    def _flush_until(self, writes: Sequence[store.RequestWrite], deadline: float) -> store.Flushed:
        said = False
        while True:
            try:
                return store.flush(self._db, writes, lease_seconds=self._lease)
            except WorkerError as error:
                if time.monotonic() >= deadline:
                    raise
                if not said:  # once, not five times a second
                    log.warning("flush.retry error=%s", error)
                    said = True
                time.sleep(_RETRY_SECONDS)

    def _write(self, request: _Open) -> store.RequestWrite:
        claimed, error = request.claimed, request.error
        return store.RequestWrite(
            request_id=claimed.request_id,
            epoch=claimed.epoch,
            attempt=claimed.attempt,
            chunks=tuple(_chunk_write(choice, chunk) for choice, chunk in request.chunks.items()),
            ends=tuple(request.ends),
            outcome=request.outcome,
            error=(error.code, error.message) if error else None,
            usage=store.UsageWrite(
                prompt_tokens=request.prompt_tokens,
                cached_tokens=request.cached_tokens,
                completion_tokens=request.completion_tokens,
                replayed_tokens=request.replayed_tokens,
            ),
            system_fingerprint=self._fingerprint,
            warnings=request.warnings,
            idle_attempts=0 if request.completion_tokens else claimed.idle_attempts,
            waiting=not request.prompt_tokens,
        )

    def _settle(self, write: store.RequestWrite, gone: frozenset[int]) -> None:
        request = self._open[write.request_id]
        request.flushed = True
        request.proven = request.proven or any(len(chunk.token_ids) for chunk in write.chunks)
        request.chunks, request.ends = {}, []
        if write.request_id in gone or write.outcome is not None:
            del self._open[write.request_id]
        if write.outcome is not None and write.request_id not in gone:
            self.finished_jobs.add(request.claimed.job_id)
            metrics.OUTCOMES.labels(self._model, write.outcome).inc()
            metrics.REPLAYED.labels(self._model).inc(request.replayed_tokens)
            log.info("request.%s id=%s", write.outcome, write.request_id)


def _gather(request: _Open, event: Event) -> int:
    """Take note of it; how many new tokens it brought."""
    match event:
        case Started():
            if not request.prompt_tokens:  # begun again, it finds what it computed itself
                request.cached_tokens = event.cached_tokens
            request.prompt_tokens = event.prompt_tokens
            request.warnings = event.warnings
            request.replayed_tokens += event.replayed_tokens  # parked and begun again: both count
        case Tokens():
            chunk = request.chunks.setdefault(event.choice, _Chunk(event.start))
            chunk.tokens += event.tokens
            chunk.text.append(event.text)
            chunk.logprobs += event.logprobs
            chunk.calls += event.calls
            request.completion_tokens += len(event.tokens)
            return len(event.tokens)
        case Finished():
            end = store.ChoiceEnd(event.choice, event.finish_reason, event.text)
            request.ends.append(end)
            request.unfinished.discard(event.choice)
        case Failed():
            request.error = event.error
        case Broken():
            request.broken = event.error
    return 0


def _chunk_write(choice: int, chunk: _Chunk) -> store.ChunkWrite:
    return store.ChunkWrite(
        choice=choice,
        token_start=chunk.start,
        token_ids=np.asarray(chunk.tokens, dtype=np.int32),
        text="".join(chunk.text),
        logprobs=chunk.logprobs or None,
        calls=_merged(chunk.calls) or None,
    )


def _merged(deltas: Iterable[CallDelta]) -> list[dict[str, object]]:
    """The headers of the calls that began, each call's fragments joined to one behind its own."""
    found: list[dict[str, object]] = []
    for delta in deltas:
        if delta.name is not None:
            found.append({"index": delta.index, "name": delta.name, "arguments": ""})
        if not delta.arguments:
            continue
        last = found[-1] if found else {}
        if last.get("index") == delta.index and "name" not in last:
            last["arguments"] = f"{last['arguments']}{delta.arguments}"
        else:
            found.append({"index": delta.index, "arguments": delta.arguments})
    return found
