"""What the routes of the status API take in their paths and queries, and how it is found.

Knows nothing of what they answer.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Path, Query, Request
from pydantic import AfterValidator, AwareDatetime, BeforeValidator

from orchestrator.api.auth import Caller
from orchestrator.api.context import Context
from orchestrator.api.errors import ApiError
from orchestrator.db import views

_DATED = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]", re.ASCII)
_EPOCH, _END = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


def _dated(given: object) -> object:
    """A date and time, not seconds since 1970 in any notation, which pydantic would take too."""
    if isinstance(given, str) and not _DATED.match(given):
        raise ValueError("a date and time with its zone is expected, such as 2026-11-23T20:00:00Z")
    return given


def _in_range(instant: datetime) -> datetime:
    """Where every zone and database can tell it; nothing is older or comes later."""
    return min(max(instant, _EPOCH), _END).astimezone(UTC)


JobId = Annotated[
    str,
    Path(
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="A job's id, its name (the newest of that name), or its id's beginning.",
    ),
]
Instant = Annotated[AwareDatetime, BeforeValidator(_dated), AfterValidator(_in_range)]
After = Annotated[
    int | None, Query(ge=0, lt=2**63, description="`next` of the page before, or nothing.")
]
Limit = Annotated[int, Query(ge=1, le=100, description="How many at most.")]
RequestId = Annotated[int, Path(ge=0, lt=2**63, description="A request's id.")]


def only_known(request: Request) -> None:
    """Refuse a query that the route does not know: a filter with a slip would leave out nothing."""
    known = [each.alias for each in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "no query"
            message = f"Unknown query '{name[:80]}': expected {expected}."
            raise ApiError(400, message, param=name[:80], code="unknown_parameter")


def found_job(ctx: Context, caller: Caller, job: str) -> str:
    """The id of the job that is meant, if the caller sees it. Raises NotFound, Conflict."""
    return views.find_job(ctx.db, job, owner=caller.sees)
