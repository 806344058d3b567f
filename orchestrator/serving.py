"""`penstock serve`, and what `penstock up` runs beside its worker: the server and its door.

Knows how the command is spelt, when keys are needed and where models lie; what is asked stands in
`orchestrator.api`, which is imported, as `workers` is, only where it is needed.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Self

import typer

from orchestrator import fleet
from orchestrator.db.database import Database
from orchestrator.db.keys import has_keys
from orchestrator.errors import SpecError, WorkerError
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.spec.plan import Plan
from orchestrator.terminal import talk

if TYPE_CHECKING:
    from orchestrator.api.server import ApiServer
    from workers.folders.folder import ModelFolder
    from workers.loading.wording import Wording

LOOPBACK, PORT = "127.0.0.1", 8000

HostOption = Annotated[
    str, typer.Option(metavar="HOST", help="Address to listen at; beyond loopback keys are needed.")
]
PortOption = Annotated[
    int | None,
    typer.Option(min=0, max=65535, metavar="P", help="Port to listen at; 0: any free one."),
]
KeysOption = Annotated[bool, typer.Option("--keys", help="Want API keys on loopback too.")]
AtHandOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="DIR", help="A model whose files are at hand beside those of the folder."
    ),
]


def serve(
    host: HostOption = LOOPBACK,
    port: PortOption = None,
    model: AtHandOption = None,
    keys: KeysOption = False,
) -> None:
    """The API and the pages, without a worker, until SIGTERM or Ctrl-C.

    Example: penstock serve --port 8000
    """
    settings = Settings.from_env()
    stopped = fleet.stopped_by_signals()
    port = PORT if port is None else port
    with (
        Database.open(settings.database_url) as db,
        closing(Queue(settings)) as queue,
        serving(settings, db, queue, host, port, keys, model or ()) as server,
    ):
        while not stopped.wait(1.0):
            if not server.alive:
                raise WorkerError("api", "it has stopped by itself")


@contextmanager
def serving(
    settings: Settings,
    db: Database,
    queue: Queue,
    host: str,
    port: int | None,
    keys: bool,
    models: Sequence[str] = (),
) -> Iterator[ApiServer]:
    """The server for the time of the block, its URL told on stderr; `port` None: 8000 if free.

    Raises SpecError where keys are needed and there is none, WorkerError where it cannot listen.
    """
    from orchestrator.api.app import create_app
    from orchestrator.api.logs import RequestIdFilter
    from orchestrator.api.server import ApiServer, listen

    needed = keys or not is_loopback(host)
    if needed and not has_keys(db):
        raise SpecError(
            "--keys" if keys else f"--host {host}",
            "an API key, which is needed there: penstock keys create NAME --scope admin",
            "no key in the database",
        )
    door = Door.open(settings, models)
    app = create_app(settings, db, queue, keys_needed=needed, models=door.models, check=door.check)
    for handler in logging.getLogger().handlers:
        handler.addFilter(RequestIdFilter())
    with ApiServer(app, listen(host, port, usual=PORT)) as server:
        talk(f"api: {server.url} ({'API keys needed' if needed else 'this machine only'})")
        yield server


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches that address; a name is believed only `localhost`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Door:
    """What the models' files say of a plan, each model's read once and kept; thread-safe.

    The models are those at hand when it was opened: a name that somebody sends is compared with
    theirs, and is never a path.
    """

    def __init__(self, folders: Mapping[str, ModelFolder], settings: Settings) -> None:
        self._folders, self._settings = dict(folders), settings
        self._wordings: dict[str, Wording] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, settings: Settings, models: Sequence[str] = ()) -> Self:
        """With the whole folders of `models_dir`, `tiny`, and the models named. Raises NotFound."""
        from workers.folders.folder import ModelFolder, find_model, list_models

        found = [each for each in list_models(settings.models_dir) if isinstance(each, ModelFolder)]
        found += [find_model(each, settings.models_dir) for each in models]
        return cls({each.name: each for each in found}, settings)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models at hand."""
        return tuple(sorted(self._folders))

    def check(self, plan: Plan) -> None:
        """Raises SpecError for what no worker could do; a model that is not at hand is let pass."""
        from workers.door import check_plan

        folder = self._folders.get(plan.spec.model)
        if folder is not None:
            context = fleet.context_of(folder, self._settings)
            check_plan(plan, self._wording(folder), context=context)

    def _wording(self, folder: ModelFolder) -> Wording:
        from workers.loading.wording import Wording

        with self._lock:
            if folder.name not in self._wordings:
                seconds = self._settings.template_seconds
                self._wordings[folder.name] = Wording.load(folder.path, template_seconds=seconds)
            return self._wordings[folder.name]
