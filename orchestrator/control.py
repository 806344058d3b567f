"""The commands that steer jobs, and those that serve a fleet: submit, cancel, ..., scheduler, up.

`cli.py` gives them their names. Knows how their options are spelt; what they do to rows stands in
`lifecycle.py`, `scheduler.py` and `workers`, which is imported only inside the commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Annotated

import typer

from orchestrator import fleet, lifecycle, serving
from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.errors import NotFound, WorkerError
from orchestrator.jobfile import read_plan
from orchestrator.metrics import MetricsServer
from orchestrator.queue import Queue
from orchestrator.reading import JobArgument, existing
from orchestrator.reconciler import looks_every
from orchestrator.scheduler import Scheduler
from orchestrator.settings import Settings
from orchestrator.spec.plan import Plan
from orchestrator.terminal import say, talk

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="A job's YAML file, or the name of a bundled job.")
]
IntervalOption = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        max=3600,
        metavar="S",
        help="Seconds between two ticks; by default 5, or half a lease where that is less.",
    ),
]


def submit(
    file: FileArgument,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The folder of the job's model, to check against."),
    ] = None,
) -> None:
    """Plan a job and queue it for the fleet's workers; prints its id.

    Example: penstock submit jobs/quickstart.yaml
    """
    settings = Settings.from_env()
    made = read_plan(file)
    check_at_door(made, model, settings)
    with Database.open(settings.database_url) as db, closing(Queue(settings)) as queue:
        say(lifecycle.submit(db, made, queue))
        name = made.spec.model
        if not any(worker.model == name for worker in views.live_workers(db)):
            talk(f"no live worker serves model {name} yet: penstock worker --model {name}")


def cancel(
    job: JobArgument,
    reason: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Why, for those who look later.")
    ] = None,
) -> None:
    """Cancel what has not ended; running requests stop within a second, their text kept.

    Example: penstock cancel arithmetic --reason "wrong prompt"
    """
    with existing(Settings.from_env()) as db:
        job_id = views.find_job(db, job)
        lifecycle.cancel(db, job_id, reason)
        say(f"cancelled {job_id}")


def pause(job: JobArgument) -> None:
    """Claim no more of a job; running requests come back within a second, their tokens kept.

    Example: penstock pause arithmetic
    """
    with existing(Settings.from_env()) as db:
        job_id = views.find_job(db, job)
        lifecycle.pause(db, job_id)
        say(f"paused {job_id}")


def retry(job: JobArgument) -> None:
    """Queue a job's failed requests again, and only those; what they have generated is kept.

    Example: penstock retry arithmetic
    """
    settings = Settings.from_env()
    with existing(settings) as db, closing(Queue(settings)) as queue:
        job_id = views.find_job(db, job)
        say(f"retried {lifecycle.retry(db, job_id, queue)} requests of {job_id}")


def scheduler(interval: IntervalOption = None, metrics_port: fleet.MetricsOption = None) -> None:
    """Tick, and look after what was left behind, until SIGTERM or Ctrl-C; any number may run.

    Example: penstock scheduler
    """
    settings = Settings.from_env()
    every = interval or looks_every(settings.lease_seconds)
    stopped = fleet.stopped_by_signals()
    with ExitStack() as open_until_end:
        db = open_until_end.enter_context(Database.open(settings.database_url))
        queue = open_until_end.enter_context(closing(Queue(settings)))
        queue.check_broker()
        if metrics_port is not None:
            server = MetricsServer(metrics_port, lambda: views.queue_depths(db))
            open_until_end.enter_context(closing(server))
        private = settings.webhook_private
        ticking = Scheduler(db, queue, interval_seconds=every, webhook_private=private)
        running = open_until_end.enter_context(ticking)
        talk(f"scheduler: a look every {every:g} s")
        while not stopped.wait(1.0):
            if not running.alive:
                raise WorkerError("scheduler", "it has stopped by itself")


def up(
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="A model's folder, or its name; tiny by default."),
    ] = None,
    slots: fleet.SlotsOption = None,
    max_context: fleet.ContextOption = None,
    max_stall_ms: fleet.StallOption = None,
    device: fleet.DeviceOption = "cpu",
    grace: fleet.GraceOption = None,
    metrics_port: fleet.MetricsOption = None,
    host: serving.HostOption = serving.LOOPBACK,
    port: serving.PortOption = None,
    keys: serving.KeysOption = False,
) -> None:
    """API, pages, worker, scheduler and reconciler in one process, until SIGTERM or Ctrl-C.

    On SQLite and the broker in this process, or against the URLs in the environment.
    Example: penstock up --model tiny
    """
    settings = fleet.with_given(
        Settings.from_env(),
        slots=slots,
        max_context=max_context,
        max_stall_ms=max_stall_ms,
        grace_seconds=grace,
    )
    models = model or ["tiny"]

    @contextmanager
    def beside(settings: Settings, db: Database, queue: Queue) -> Iterator[None]:
        api = serving.serving(settings, db, queue, host, port, keys, models)
        with _ticking(settings, db, queue), api:
            yield

    raise typer.Exit(fleet.work(settings, models, device, metrics_port, beside=beside))


def _ticking(settings: Settings, db: Database, queue: Queue) -> Scheduler:
    every = looks_every(settings.lease_seconds)
    return Scheduler(db, queue, interval_seconds=every, reconcile_here=False)  # the worker does


def check_at_door(made: Plan, model: str | None, settings: Settings) -> None:
    """What only the model's files can tell, where they are at hand. Raises SpecError, NotFound."""
    from workers.door import check_plan
    from workers.folders.folder import find_model
    from workers.loading.wording import Wording

    try:
        folder = find_model(model or made.spec.model, settings.models_dir)
    except NotFound:
        if model is not None:
            raise
        talk(f"model {made.spec.model} is not here: its prompts are checked when they are claimed")
        return
    wording = Wording.load(folder.path, template_seconds=settings.template_seconds)
    check_plan(made, wording, context=fleet.context_of(folder, settings))
