"""Small plans and writes for the database's tests."""

from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.db.database import Database
from orchestrator.db.store import (
    ChoiceEnd,
    ChunkWrite,
    Claimed,
    RequestWrite,
    UsageWrite,
    claim,
)
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import Plan, plan


def small_plan(
    n_items: int = 2,
    temperatures: tuple[float, ...] = (0, 1),
    *,
    n: int = 1,
    name: str = "small",
    model: str = "tiny",
    priority: int = 0,
    limits: str = "",
) -> Plan:
    """n_items * len(temperatures) requests of n choices each; `limits` as the YAML says them."""
    items = "\n".join(f"    - {{a: {position}}}" for position in range(n_items))
    text = f"""
name: {name}
model: {model}
priority: {priority}
dataset:
  items:
{items}
params:
  messages: [{{role: user, content: "What is {{{{ a }}}}?"}}]
  max_tokens: 24
  n: {n}
sweep:
  temperature: {list(temperatures)}
graders:
  - {{name: correct, type: equals, expected: "{{{{ a }}}}"}}
{f"limits: {{{limits}}}" if limits else ""}
"""
    return plan(parse_job(text, file="small.yaml", root=Path.cwd()))


def claim_some(
    db: Database, limit: int = 100, *, lease: float = 60, worker: str = "w", alone: bool = True
) -> list[Claimed]:
    """Claim of the model tiny."""
    return claim(db, model="tiny", worker_id=worker, limit=limit, lease_seconds=lease, alone=alone)


def pairs(claims: list[Claimed]) -> list[tuple[int, int]]:
    """As `release` takes them."""
    return [(claimed.request_id, claimed.epoch) for claimed in claims]


def run(db: Database, sql: str) -> None:
    """A person's SQL, such as one that lets time pass."""
    with db.write() as connection:
        connection.exec_driver_sql(sql)


def tokens(*ids: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """int32, shape (len(ids),)."""
    return np.array(ids, dtype=np.int32)


def write(
    claimed: Claimed,
    start: int = 0,
    ids: tuple[int, ...] = (),
    text: str = "",
    *,
    choice: int = 0,
    end: str | None = None,
    whole: str = "",
    outcome: str | None = None,
    error: tuple[str, str] | None = None,
    usage: UsageWrite | None = None,
) -> RequestWrite:
    """One chunk of one choice (none without ids and text), perhaps its end, perhaps the outcome."""
    chunks = (ChunkWrite(choice, start, tokens(*ids), text),) if ids or text else ()
    ends = (ChoiceEnd(choice, end, whole),) if end else ()
    return RequestWrite(
        claimed.request_id,
        claimed.epoch,
        claimed.attempt,
        chunks=chunks,
        ends=ends,
        outcome=outcome,
        error=error,
        usage=usage,
        system_fingerprint="fp_test",
    )


def rows(db: Database, sql: str) -> list[tuple[Any, ...]]:
    """What a person's SQL sees."""
    with db.read() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(sql)]


def everything(db: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the tables that a flush may write, leases left out."""
    return {
        "requests": rows(
            db,
            "SELECT id, state, epoch, attempt, idle_attempts, worker_id, error_code, finished_at "
            "FROM requests ORDER BY id",
        ),
        "choices": rows(db, "SELECT * FROM choices ORDER BY request_id, choice"),
        "chunks": rows(
            db,
            "SELECT request_id, choice, token_start, n_tokens, token_ids, text "
            "FROM chunks ORDER BY request_id, choice, token_start",
        ),
        "usage": rows(db, "SELECT * FROM usage ORDER BY request_id, attempt"),
    }
