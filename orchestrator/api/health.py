"""Whether this server and its database answer. Needs no key, and says nothing of what is there."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from orchestrator.api.context import Ctx
from orchestrator.db import health as database

router = APIRouter(prefix="/api", tags=["health"])


class Health(BaseModel):
    """The server answers, and so does its database."""

    status: Literal["ok"] = Field(description="Always `ok`; where something is away it is a 503.")
    version: str = Field(description="Penstock's version.")
    schema_: str = Field(alias="schema", description="The number of the database's schema.")


@router.get("/health")
def health(ctx: Ctx) -> Health:
    """Whether the server and its database answer."""
    found = database.schema(ctx.db)
    return Health(status="ok", version=version("penstock"), schema=found)
