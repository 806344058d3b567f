"""What every route needs, made once for the application. Knows nothing of routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from orchestrator.api.tails import Tails
from orchestrator.db.database import Database
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.plan import Plan
from orchestrator.spec.prices import CURRENCY, Prices


@dataclass(frozen=True, slots=True)
class Context:
    """One application's settings, database, queue and shared followers.

    `keys_needed`: a request without an API key is refused; otherwise it is the machine's own, with
    every scope. `models`: names of the models that are at hand here; those of live workers come
    to them. `check`: refuses at the door what this door takes no more of, and what the model's
    files, where they are at hand, say no worker could do (SpecError). `prices`: what tokens cost,
    empty where nobody said.
    """

    settings: Settings
    db: Database
    queue: Queue
    tails: Tails
    keys_needed: bool = True
    models: tuple[str, ...] = ()
    check: Callable[[Plan], None] = lambda plan: None
    prices: Prices = field(default_factory=lambda: Prices(CURRENCY, {}))


def context(request: Request) -> Context:
    """The context of the application that the request came to."""
    found: Context = request.app.state.context
    return found


Ctx = Annotated[Context, Depends(context)]
