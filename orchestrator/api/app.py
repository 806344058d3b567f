"""The application: its routes, its errors, its middle. What a route does stands with the route."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request, Response

from orchestrator import allowance
from orchestrator.api import errors, fleet, health, jobs, requests
from orchestrator.api.auth import Believed
from orchestrator.api.context import Context
from orchestrator.api.dashboard import pages
from orchestrator.api.dashboard.lately import Lately
from orchestrator.api.dashboard.rendering import problem
from orchestrator.api.document import describe
from orchestrator.api.headers import SafeHeaders
from orchestrator.api.limits import Limited, Rates, Streams
from orchestrator.api.logs import Logged
from orchestrator.api.openai import batches, chat, files, listing, stored
from orchestrator.api.origins import SameOrigin
from orchestrator.api.tags import Tagged
from orchestrator.api.tails import Tails
from orchestrator.db.database import Database
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.plan import Plan
from orchestrator.spec.prices import read_prices

_ABOUT = (
    "Jobs of language-model completions: submitted, followed, read. Under `/api` the status API, "
    "under `/v1` the OpenAI surface; both read and write the same rows. Every error has the body "
    '`{"error": {"message", "type", "param", "code"}}`.'
)
_ROUTERS = (health, jobs, requests, fleet, chat, stored, listing, files, batches, pages)


class Application(FastAPI):
    """FastAPI with our own words about errors and keys in its document, made once."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            keys_needed = self.state.context.keys_needed
            self.openapi_schema = describe(self, keys_needed=keys_needed)
        return self.openapi_schema


def create_app(
    settings: Settings,
    db: Database,
    queue: Queue,
    *,
    keys_needed: bool,
    models: tuple[str, ...] = (),
    check: Callable[[Plan], None] = lambda plan: None,
) -> Application:
    """The whole of it, on an open database and queue. Raises SpecError for a bad price table."""

    def checked(plan: Plan) -> None:
        allowance.check(plan, settings)
        check(plan)

    prices = read_prices(settings.prices)
    context = Context(settings, db, queue, Tails(db), keys_needed, models, checked, prices)
    app = Application(
        title="Penstock",
        version=version("penstock"),
        description=_ABOUT,
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_closing_tails,
    )
    app.state.context = context
    app.state.believed = Believed()
    app.state.lately = Lately()
    app.state.form_secret = secrets.token_bytes(32)
    app.state.rates = Rates(settings.rate_per_minute)
    app.state.streams = Streams(settings.max_streams)
    for module in _ROUTERS:
        app.include_router(module.router)
    errors.install(app, _page)
    # The last one added is the outermost.
    app.add_middleware(Tagged)
    app.add_middleware(Limited, settings=settings, streams=app.state.streams)
    app.add_middleware(SameOrigin, keys_needed=keys_needed)
    app.add_middleware(Logged)
    app.add_middleware(SafeHeaders)
    return app


def _page(request: Request, error: errors.ApiError) -> Response:
    answer = problem(request, error.status, error.message)
    answer.headers.update(error.headers)
    return answer


@asynccontextmanager
async def _closing_tails(app: FastAPI) -> AsyncIterator[None]:
    yield
    await to_thread.run_sync(app.state.context.tails.close)
