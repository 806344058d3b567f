"""A request read piece by piece while it runs, and read later: the same bytes."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator import follow
from orchestrator.db import store, views
from orchestrator.db.database import Database
from orchestrator.db.store import ChoiceEnd, ChunkWrite, Claimed, RequestWrite, UsageWrite
from orchestrator.export import completion
from orchestrator.follow import request_chunks
from orchestrator.spec.chunks import Json, fold
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan
from tests.orchestrator.db.builders import claim_some, rows, run, tokens

N = 3
JOB = f"""
name: live
model: tiny
params:
  messages: [{{role: user, content: hello}}]
  n: {N}
  logprobs: true
  stream_options: {{include_usage: true}}
"""


class Writer:
    """A worker that stores random chunks of a request's choices, and is replaced now and then."""

    def __init__(self, db: Database, seed: int) -> None:
        self._db, self._random = db, random.Random(seed)
        self.job_id = store.insert_job(db, plan(parse_job(JOB, file="x.yaml", root=Path.cwd())))
        self.stored: list[tuple[int, int]] = []
        self._starts, self._calls = [0] * N, [0] * N
        self._left = [self._random.randrange(7) for _ in range(N)]
        self._open = set(range(N))
        self._claimed = self._claim()

    @property
    def request_id(self) -> int:
        return self._claimed.request_id

    @property
    def over(self) -> bool:
        """The request has ended."""
        return not self._open

    def sleep(self, seconds: float) -> None:
        """What happens while the reader waits."""
        for _ in range(self._random.randrange(4)):
            if self._open:
                self._flush()
            if self._open and self._random.random() < 0.2:
                store.release(self._db, [(self._claimed.request_id, self._claimed.epoch)])
                self._claimed = self._claim()

    def _claim(self) -> Claimed:
        (claimed,) = claim_some(self._db)
        self._spent = 0
        return claimed

    def _flush(self) -> None:
        order = self._random.sample(sorted(self._open), len(self._open))
        made = [part for choice in order for part in self._of(choice)]
        chunks = tuple(part for part in made if isinstance(part, ChunkWrite))
        ends = tuple(part for part in made if isinstance(part, ChoiceEnd))
        self._open -= {end.choice for end in ends}
        self.stored += [(chunk.choice, chunk.token_start) for chunk in chunks]
        self._spent += sum(len(chunk.token_ids) for chunk in chunks)
        epoch = self._claimed.epoch
        write = RequestWrite(
            *(self.request_id, epoch, self._claimed.attempt, chunks, ends),
            outcome=None if self._open else "succeeded",
            usage=UsageWrite(5, 0, self._spent, 0),
            system_fingerprint=f"fp_{epoch}",
            warnings=(f"warned by {epoch}",),
        )
        assert not store.flush(self._db, [write], lease_seconds=60).lost

    def _of(self, choice: int) -> Iterator[ChunkWrite | ChoiceEnd]:
        """At most one chunk of a choice, and its end when it has come to it."""
        if self._random.random() < 0.3:
            return
        if self._left[choice]:
            self._left[choice] -= 1
            yield self._chunk(choice, self._random.randrange(1, 4))
            return
        if self._random.random() < 0.5:
            yield self._chunk(choice, 0)
        yield ChoiceEnd(choice, "stop", "")

    def _chunk(self, choice: int, n: int) -> ChunkWrite:
        start, self._starts[choice] = self._starts[choice], self._starts[choice] + n
        text = "" if self._calls[choice] else self._random.choice(["", "é", "ab"])
        calls: list[dict[str, object]] = []
        if self._random.random() < 0.3:
            calls += [{"index": self._calls[choice], "name": "f", "arguments": ""}]
            self._calls[choice] += 1
        if self._calls[choice]:
            calls += [{"index": self._calls[choice] - 1, "arguments": '{"a'}]
        entry = {"token": text, "logprob": -1.0, "bytes": None, "top_logprobs": []}
        entries = [entry] if text else None
        return ChunkWrite(choice, start, tokens(*range(n)), text, entries, calls or None)


def test_what_is_read_in_pieces_is_what_is_replayed(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(25):
        print(f"seed {seed}")
        writer = Writer(db, seed)
        monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=writer.sleep))
        live = [json.dumps(chunk) for chunk in request_chunks(db, writer.request_id)]
        replayed = list(request_chunks(db, writer.request_id))
        assert live == [json.dumps(chunk) for chunk in replayed]
        check_replay(db, writer, replayed)


def test_what_an_older_version_stored_is_told_whole(sqlite_db: Database) -> None:
    """Its chunks have no position: they come in the order of their tokens."""
    writer = Writer(sqlite_db, seed=1)
    while not writer.over:
        writer.sleep(0)
    before = fold(request_chunks(sqlite_db, writer.request_id))
    run(sqlite_db, "UPDATE chunks SET position = 0")
    chunks = views.chunks_after(sqlite_db, writer.request_id)
    places = [(chunk.token_start, chunk.choice) for chunk in chunks]
    assert places == sorted(places) and len(places) == len(writer.stored) > 5
    assert fold(request_chunks(sqlite_db, writer.request_id)) == before


def check_replay(db: Database, writer: Writer, replayed: list[Json]) -> None:
    """In the order of storing, whole, and equal to what is exported."""
    wanted = f"FROM chunks WHERE request_id = {writer.request_id} ORDER BY position"
    assert rows(db, f"SELECT choice, token_start {wanted}") == writer.stored
    parts = [part for chunk in replayed for part in chunk["choices"]]
    assert [part["index"] for part in parts if part["finish_reason"]] == list(range(N))
    counted = sum(n for (n,) in rows(db, f"SELECT n_tokens {wanted}"))
    assert replayed[-1]["usage"]["completion_tokens"] == counted
    (result,) = views.results(db, writer.job_id)
    assert completion(result) == fold(replayed)
