"""The real server over a fresh database: with a worker or without, with keys or without.

`api` and its kin are an `Api`: its `url`, an httpx client `http` at it, and what lies behind it. A
test that wants other settings calls `api_at`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from orchestrator.api.app import Application, create_app
from orchestrator.api.server import ApiServer, listen
from orchestrator.db.database import Database
from orchestrator.db.keys import create_key
from orchestrator.queue import Queue
from orchestrator.serving import Door
from orchestrator.settings import Settings
from workers.folders.folder import find_model
from workers.loading.model import LoadedModel
from workers.process import local_worker

SECONDS = 60.0
SLOTS = 8


@dataclass(frozen=True, slots=True)
class Api:
    """A server at work; `http` sends no key."""

    url: str
    http: httpx.Client
    app: Application
    db: Database
    queue: Queue
    settings: Settings

    def key(self, name: str, *scopes: str, owner: str | None = None) -> str:
        """A new key's text."""
        return create_key(self.db, name, scopes or ("submit",), owner)[1]

    def bearer(self, name: str, *scopes: str, owner: str | None = None) -> dict[str, str]:
        """The header of a new key."""
        return {"authorization": f"Bearer {self.key(name, *scopes, owner=owner)}"}


def settings_in(folder: Path) -> Settings:
    """Settings whose files lie in that folder; whoever waits is told soon."""
    return Settings(
        database_url=f"sqlite:///{folder / 'penstock.db'}",
        files_dir=folder / "files",
        cache_dir=folder / "cache",
        flush_seconds=0.05,
        poll_seconds=0.1,
        slots=SLOTS,
    )


@contextmanager
def api_at(db: Database, settings: Settings, *, keys_needed: bool = False) -> Iterator[Api]:
    """A server on this database for the time of the block."""
    door = Door.open(settings)
    with ExitStack() as stack:
        queue = stack.enter_context(closing(Queue(settings)))
        app = create_app(
            settings, db, queue, keys_needed=keys_needed, models=door.models, check=door.check
        )
        server = stack.enter_context(ApiServer(app, listen("127.0.0.1", 0)))
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=SECONDS))
        yield Api(server.url, http, app, db, queue, settings)


@pytest.fixture
def api_settings(tmp_path: Path) -> Settings:
    """The settings of `api`; a test may override the fixture."""
    return settings_in(tmp_path)


@pytest.fixture
def api(sqlite_db: Database, api_settings: Settings) -> Iterator[Api]:
    """A server without a worker, the machine's own caller."""
    with api_at(sqlite_db, api_settings) as served:
        yield served


@pytest.fixture
def keyed_api(sqlite_db: Database, api_settings: Settings) -> Iterator[Api]:
    """A server without a worker that wants a key."""
    with api_at(sqlite_db, api_settings, keys_needed=True) as served:
        yield served


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The model `tiny` in memory, for workers in this process."""
    settings = settings_in(tmp_path_factory.mktemp("tiny"))
    return LoadedModel.load(find_model("tiny", settings.models_dir), settings, slots=SLOTS)


@pytest.fixture
def api_with_worker(api: Api, tiny_model: LoadedModel) -> Iterator[Api]:
    """`api` and a worker on `tiny` in this process."""
    with local_worker(api.settings, api.db, api.queue, tiny_model):
        yield api


@pytest.fixture
def keyed_api_with_worker(keyed_api: Api, tiny_model: LoadedModel) -> Iterator[Api]:
    """`keyed_api` and a worker on `tiny` in this process."""
    api = keyed_api
    with local_worker(api.settings, api.db, api.queue, tiny_model):
        yield api


@pytest.fixture
def changed_api(sqlite_db: Database, api_settings: Settings) -> Callable[..., object]:
    """`api_at` with some settings changed: `with changed_api(max_body_mib=1) as api: ...`."""

    def changed(*, keys_needed: bool = False, **settings: object) -> object:
        given = replace(api_settings, **settings)  # type: ignore[arg-type]
        return api_at(sqlite_db, given, keys_needed=keys_needed)

    return changed
