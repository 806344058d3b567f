"""The commands that only read what is known: status, workers, tail, export.

Stdout is the answer, stderr the talk beside it; `cli.py` gives them their names. Knows nothing of
devices or models.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from orchestrator import terminal
from orchestrator.db import views
from orchestrator.db.database import Database
from orchestrator.errors import NotFound
from orchestrator.evaluation.report import report
from orchestrator.export import export as write_lines
from orchestrator.export import open_stream, whole_file
from orchestrator.follow import request_chunks, request_text
from orchestrator.settings import Settings

SHOWN_FAILURES = 5

JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's name, its id, or the id's beginning.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else.")]


def status(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="A job's name, id, or id's beginning.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the newest jobs, or one job point by point, and why it waits if it does.

    Example: penstock status arithmetic
    """
    with existing(Settings.from_env()) as db:
        if job is None:
            jobs = views.jobs(db)
            print_json([asdict(each) for each in jobs]) if as_json else terminal.print_jobs(jobs)
            return
        job_id = views.find_job(db, job)
        if as_json:
            points = [point.to_json() for point in report(views.points_summary(db, job_id))]
            waiting = list(views.waiting(db, job_id).reasons)
            found = asdict(views.job_status(db, job_id))
            print_json({**found, "waiting": waiting, "points": points})
        else:
            show_job(db, job_id)


def workers(as_json: JsonOption = False) -> None:
    """Show the fleet: every worker that has not left, and what it last said of itself.

    Example: penstock workers
    """
    with existing(Settings.from_env()) as db:
        found = views.workers(db)
        print_json([asdict(each) for each in found]) if as_json else terminal.print_workers(found)


def tail(
    request: Annotated[int, typer.Argument(metavar="REQUEST", help="A request's id.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="A chat.completion.chunk a line.")
    ] = False,
) -> None:
    """Print a request's text as it is persisted, until the request is at its end.

    Example: penstock tail 1000000003
    """
    with existing(Settings.from_env()) as db:
        n = views.request(db, request).n
        if as_json:
            for chunk in request_chunks(db, request):
                print(json.dumps(chunk), flush=True)
        else:
            shown = terminal.visible if sys.stdout.isatty() else str
            for piece in request_text(db, request, n):
                print(shown(piece), end="", flush=True)
        found = views.request(db, request)
    if found.state != "succeeded":
        why = f": {found.error_code}: {found.error_message}" if found.error_code else ""
        terminal.talk(f"request {request} {found.state}{why}")
        raise typer.Exit(1)


def export(
    job: JobArgument,
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="OUT", help="A file, replaced when whole; or -."),
    ] = "-",
    user: Annotated[
        str | None, typer.Option("--user", help="Only requests whose parameter `user` is this.")
    ] = None,
) -> None:
    """Write every ended request of a job as a line of JSON, its completion folded.

    Example: penstock export arithmetic -o out.jsonl
    """
    with existing(Settings.from_env()) as db:
        job_id = views.find_job(db, job)
        found = views.job_status(db, job_id)
        said = terminal.Counter("exported", terminal.done(found)).show
        place = open_stream(sys.stdout, "stdout") if output == "-" else whole_file(Path(output))
        with place as out:
            count = write_lines(views.results(db, job_id, user=user), out, said)
    if user is not None:
        terminal.talk(f"exported {count} requests of user {user}")
        return
    left = found.requests - count
    terminal.talk(f"exported {count} requests" + (f"; {left} have not ended" if left > 0 else ""))


def existing(settings: Settings) -> Database:
    """The database of a command that only reads: no file is made. Raises NotFound."""
    try:
        url = make_url(settings.database_url)
    except ArgumentError:
        return Database.open(settings.database_url)  # which says what is wrong with it
    name = (url.database or "").removeprefix("file:")
    if url.get_backend_name() == "sqlite" and not Path(name).exists():
        raise NotFound("database", name)
    return Database.open(settings.database_url)


def show_job(db: Database, job_id: str, most: int | None = None) -> None:
    """One job on stdout: the first `most` of its points, its totals, some of its failures."""
    points = report(views.points_summary(db, job_id))
    found = views.job_status(db, job_id)
    terminal.print_job(found, points, most=most)
    for reason in views.waiting(db, job_id).reasons:
        terminal.say(f"waits: {reason}")
    if found.failed:
        terminal.print_failures(views.requests(db, job_id, states=["failed"], limit=SHOWN_FAILURES))


def print_json(value: object) -> None:
    """JSON on stdout, ASCII whatever the terminal's encoding; times as ISO 8601."""
    print(json.dumps(value, indent=2, default=_iso))


def _iso(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
