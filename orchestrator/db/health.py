"""Whether the database answers. Knows nothing of what is in it but its schema's number."""

from __future__ import annotations

from sqlalchemy import text

from orchestrator.db.database import SCHEMA_TABLE, Database


def schema(db: Database) -> str:
    """The number of the schema as the database says it. Raises WorkerError if it is away."""
    with db.read() as tx:
        return str(tx.scalar(text(f"SELECT version_num FROM {SCHEMA_TABLE}")))  # noqa: S608
