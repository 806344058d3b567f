"""The command line: composes `orchestrator` with `workers`, which only commands that need a device
import.

Stdout is the answer (with `--json`, JSON and nothing else), stderr the talk beside it. Exit codes:
0 all well, 1 something failed, 2 refused at the door, 130 stopped by Ctrl-C. Knows how commands
are spelt; what they do stands in the rooms, how it looks in `terminal.py`.
"""

from __future__ import annotations

import io
import logging
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version as distribution_version
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator import (
    benching,
    control,
    fleet,
    keys,
    lifecycle,
    models,
    reading,
    serving,
    terminal,
)
from orchestrator.control import FileArgument
from orchestrator.db import views
from orchestrator.db.database import SCHEMA, Database
from orchestrator.db.views import JobStatus
from orchestrator.errors import Conflict, NotFound, PenstockError, SpecError, WorkerError
from orchestrator.fleet import ContextOption, DeviceOption, SlotsOption, StallOption, with_given
from orchestrator.follow import follow_job
from orchestrator.jobfile import describe, read_plan
from orchestrator.models import ModelOption, Place, find_folder
from orchestrator.queue import Queue
from orchestrator.reading import JobArgument, JsonOption, existing, print_json, show_job
from orchestrator.settings import Settings
from orchestrator.spec.plan import Plan
from orchestrator.terminal import Spent, say, talk

if TYPE_CHECKING:
    from workers.process import LoadedModel, LocalWorker

INTERRUPTED = 130

app = typer.Typer(
    name="penstock",
    help="Jobs of language-model completions: planned from YAML, run by ONNX workers, kept in SQL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="The models on this machine.", no_args_is_help=True)
db_app = typer.Typer(help="The database.", no_args_is_help=True)
keys_app = typer.Typer(help="The keys of the API.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(db_app, name="db")
app.add_typer(keys_app, name="keys")


def main() -> None:
    """The entry point; every PenstockError becomes one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="penstock")
    except PenstockError as error:
        talk(f"penstock: {' '.join(str(error).split())}")
        sys.exit(2 if isinstance(error, SpecError | NotFound | Conflict) else 1)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"penstock {distribution_version('penstock')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    level = Settings.from_env().log.upper()
    logging.basicConfig(level=level, handlers=[terminal.log_handler()])
    if level == "INFO":  # our own transitions, not the libraries' plumbing
        for library in ("alembic", "celery", "kombu", "uvicorn"):
            logging.getLogger(library).setLevel(logging.WARNING)


# --- running --------------------------------------------------------------------------------------


@app.command()
def run(
    file: FileArgument,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished job of this file, if any.")
    ] = False,
    model: ModelOption = None,
    slots: SlotsOption = None,
    max_context: ContextOption = None,
    max_stall_ms: StallOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Plan a job, submit it and work on it here, with live progress and a summary.

    Example: penstock run jobs/quickstart.yaml
    """
    settings = with_given(
        Settings.from_env(), slots=slots, max_context=max_context, max_stall_ms=max_stall_ms
    )
    made = read_plan(file)
    loaded = Place(model, device).load(made.spec.model, settings)
    _check_at_door(made, loaded)
    with Database.open(settings.database_url) as db, closing(Queue(settings)) as queue:
        begun = lifecycle.unfinished(db, made.spec.name, made.spec.digest)
        with _can_go_on("--resume"):
            if begun is not None and resume:
                job_id = begun
                lifecycle.resume(db, job_id, queue)
            else:
                if begun is not None:
                    talk(f"job {begun} of this very file is unfinished; --resume goes on with it")
                job_id = lifecycle.submit(db, made, queue)
            status = _work_here(settings, db, queue, job_id, loaded)
    raise typer.Exit(0 if status.state == "succeeded" else 1)


@app.command()
def resume(
    job: JobArgument,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the work to workers elsewhere.")
    ] = False,
    model: ModelOption = None,
    slots: SlotsOption = None,
    max_context: ContextOption = None,
    max_stall_ms: StallOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Go on with a job that was paused or interrupted.

    With the embedded broker (memory://) it is worked on here until it is done, unless --detach
    says otherwise; with another one its workers are woken. Example: penstock resume arithmetic
    """
    settings = with_given(
        Settings.from_env(), slots=slots, max_context=max_context, max_stall_ms=max_stall_ms
    )
    with existing(settings) as db, closing(Queue(settings)) as queue:
        job_id = views.find_job(db, job)
        if detach or not queue.embedded:
            lifecycle.resume(db, job_id, queue)
            say(f"resumed {job_id}")
            return
        loaded = Place(model, device).load(views.job(db, job_id).model, settings)
        with _can_go_on():
            lifecycle.resume(db, job_id, queue)
            status = _work_here(settings, db, queue, job_id, loaded)
    raise typer.Exit(0 if status.state == "succeeded" else 1)


@contextmanager
def _can_go_on(*options: str) -> Iterator[None]:
    """What ends the block early says how to go on: with this command line and those options."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command, *given = sys.argv[1:]
    more = [option for option in options if option not in given]
    how = f"nothing is lost, go on with: {shlex.join(['penstock', command, *more, *given])}"
    try:
        yield
    except KeyboardInterrupt:
        talk(f"stopped; {how}")
        raise typer.Exit(INTERRUPTED) from None
    except WorkerError as error:
        raise WorkerError(error.code, f"{error.message}; {how}") from error


def _work_here(
    settings: Settings, db: Database, queue: Queue, job_id: str, loaded: LoadedModel
) -> JobStatus:
    """Work until the job is at its end, grade, show; how it ended, or that it was paused."""
    from workers.process import local_worker

    first = views.job_status(db, job_id)
    talk(f"job {job_id} ({first.name}): {first.requests} requests, {terminal.done(first)} done")
    began = time.monotonic()
    with local_worker(settings, db, queue, loaded, job_id) as worker:
        with terminal.JobProgress(first) as progress:
            status = follow_job(db, job_id, progress.show, lambda: _check_worker(worker))
        spent = Spent(time.monotonic() - began, status.completion_tokens - first.completion_tokens)
    lifecycle.grade(db, job_id)
    show_job(db, job_id, most=terminal.SHOWN_POINTS)
    say(str(spent))
    examples = views.requests(db, job_id, limit=1)
    terminal.print_further(status, settings.database_url, examples[0].id if examples else None)
    return status


def _check_worker(worker: LocalWorker) -> None:
    if worker.error is not None:
        raise worker.error
    if not worker.alive:
        raise WorkerError("worker", "the engine has stopped before the job was done")


def _check_at_door(made: Plan, loaded: LoadedModel) -> None:
    from workers.door import check_plan

    check_plan(made, loaded.wording, context=loaded.runner.max_length)


# --- planning -------------------------------------------------------------------------------------


@app.command()
def plan(file: FileArgument, as_json: JsonOption = False) -> None:
    """Show what would run: cells, requests, an upper bound of tokens. Writes nothing.

    What `submit` would refuse is refused here too.
    Example: penstock plan jobs/quickstart.yaml --json
    """
    made, settings = read_plan(file), Settings.from_env()
    control.check_at_door(made, None, settings)
    described = describe(made, context=_context(made.spec.model, settings))
    print_json(described) if as_json else terminal.print_plan(described)


def _context(model: str, settings: Settings) -> int | None:
    try:
        return fleet.context_of(find_folder(model, settings), settings)
    except PenstockError:
        return None


# --- reading --------------------------------------------------------------------------------------

app.command()(reading.status)
app.command()(reading.tail)
app.command()(reading.export)


# --- the fleet ------------------------------------------------------------------------------------

app.command()(control.submit)
app.command()(control.cancel)
app.command()(control.pause)
app.command()(control.retry)
app.command()(reading.workers)
app.command()(fleet.worker)
app.command()(control.scheduler)
app.command()(control.up)
app.command()(serving.serve)


# --- keys -----------------------------------------------------------------------------------------

keys_app.command("create")(keys.create)
keys_app.command("list")(keys.list_keys)
keys_app.command("revoke")(keys.revoke)


# --- models and the database ----------------------------------------------------------------------


models_app.command("list")(models.list_models)
models_app.command("import")(models.import_model)
models_app.command("prepare")(models.prepare)
models_app.command("check")(models.check)
models_app.command("bench")(benching.bench)
app.command()(benching.bench)


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Create the database, or bring its schema up to date.

    Example: penstock db upgrade
    """
    with Database.open(Settings.from_env().database_url):
        say(f"schema {SCHEMA}")


if __name__ == "__main__":
    main()
