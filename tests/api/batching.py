"""Batches without HTTP: files of lines, a hand that ends requests in a worker's place, answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from orchestrator import files
from orchestrator.batches import Batches
from orchestrator.db import batches as batch_rows
from orchestrator.db.batches import Batch, NewBatch
from orchestrator.db.database import Database
from orchestrator.db.files import INPUT, NewFile, insert_file
from orchestrator.db.store import UsageWrite, flush
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from tests.orchestrator.db.builders import claim_some, write

Json = dict[str, Any]
OUTCOMES = ("succeeded", "context_length_exceeded", "poison")


def line(custom_id: object = "a", **body: Any) -> Json:
    """One right line, a short sum asked of `tiny`, with what is said otherwise in its body."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "What is 31 + 44?"}]}
    asked |= {"temperature": 0, "max_tokens": 8}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": asked | body,
    }


def jsonl(lines: Iterable[object]) -> bytes:
    """The lines of a file."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


@contextmanager
def looking_after(db: Database, folder: Path, **settings: Any) -> Iterator[Batches]:
    """All that looking after batches takes, with a lease of a second and the model `tiny`."""
    chosen = Settings(files_dir=folder, **{"lease_seconds": 1.0, **settings})
    with closing(Queue(chosen)) as queue:
        yield Batches(chosen, db, queue, ("tiny",))


def stored(my: Batches, content: bytes, owner: str = "") -> str:
    """The id of a file with this content, as an upload would have left it."""
    file_id = files.new_id("file-")
    with files.incoming(my.folder) as out:
        out.write(content)
        size = files.keep(out, my.folder, file_id)
    insert_file(my.db, NewFile(file_id, owner, "lines.jsonl", INPUT, size))
    return file_id


def entered(my: Batches, content: bytes, *, window: int = 3600, owner: str = "") -> str:
    """The id of a batch of this content that waits to be validated."""
    asked = NewBatch(
        files.new_id("batch_"),
        owner,
        "/v1/chat/completions",
        stored(my, content, owner),
        f"{window}s",
        window,
    )
    return batch_rows.insert_batch(my.db, asked, sees=None).id


def work(db: Database, limit: int, outcome: random.Random | str = "succeeded") -> int:
    """End so many queued requests in a worker's place, as `outcome` says; how many there were."""
    claimed = claim_some(db, limit)
    for each in claimed:
        how = outcome if isinstance(outcome, str) else outcome.choice(OUTCOMES)
        spent = UsageWrite(5, 0, 3, 0)
        end = write(each, 0, (1, 2, 3), "abc", end="stop", whole="abc", outcome=how, usage=spent)
        if how != "succeeded":
            end = write(each, outcome="failed", error=(how, "it went wrong"), usage=spent)
        flush(db, [end], lease_seconds=60)
    return len(claimed)


def answers(my: Batches, batch: Batch) -> tuple[list[Json], list[Json]]:
    """The lines of its output file and of its error file."""
    return _read(my, batch.output_file_id), _read(my, batch.error_file_id)


def _read(my: Batches, file_id: str | None) -> list[Json]:
    if file_id is None:
        return []
    text = files.place(my.folder, file_id).read_bytes()
    assert text.endswith(b"\n")
    return [json.loads(each) for each in text.splitlines()]
