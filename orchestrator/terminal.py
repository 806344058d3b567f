"""How a person sees it in a terminal: live progress, tables, one line for an error.

Knows rich and the shape of what `views` returns; decides nothing and reads no database. What goes
to stdout is the answer, what goes to stderr is the talk beside it, so that a pipe gets the answer.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from sqlalchemy import make_url

from orchestrator.db.views import JobStatus, RequestStatus, Worker
from orchestrator.evaluation.report import PointReport, table

PLAIN_INTERVAL_SECONDS = 5.0
SHOWN_POINTS = 60
_PIPE_WIDTH = 200


def console(stream: TextIO) -> Console:
    """Text as it is (no markup, no emoji codes); wide where no terminal sets the width."""
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def visible(text: str) -> str:
    """The text with control characters escaped, so that no text can steer the terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else _escaped(c) for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """A table on stdout; the first `left` columns are text, the others numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(visible(cell) for cell in row))
    console(sys.stdout).print(table)


def duration(seconds: float) -> str:
    """`7.4 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a job goes: new tokens a second, and the seconds left (None where unknown)."""

    tokens_per_second: float
    seconds_left: float | None

    @classmethod
    def between(cls, first: JobStatus, now: JobStatus, elapsed: float) -> Pace:
        """The pace from one reading of the job's status to a later one, `elapsed` seconds apart."""
        ended, before = done(now), done(first)
        tokens = (now.completion_tokens - first.completion_tokens) / max(elapsed, 1e-9)
        if ended <= before:
            return cls(tokens, None)
        return cls(tokens, (now.requests - ended) * elapsed / (ended - before))

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"{self.tokens_per_second:,.0f} tokens/s{left}"


def done(status: JobStatus) -> int:
    """How many requests of the job are at their end."""
    return status.succeeded + status.failed + status.cancelled


class JobProgress:
    """Progress of one job on stderr: a live bar on a terminal, else a line every few seconds."""

    def __init__(self, first: JobStatus) -> None:
        self._first, self._began = first, time.monotonic()
        self._console = console(sys.stderr)
        self._task = TaskID(0)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} requests"),
            TextColumn("{task.fields[pace]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._spoke_at = self._began

    def __enter__(self) -> JobProgress:
        self._bar.start()
        name = visible(self._first.name)
        self._task = self._bar.add_task(name, total=self._first.requests, pace="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, status: JobStatus) -> None:
        """Show where the job stands now."""
        now = time.monotonic()
        pace = Pace.between(self._first, status, now - self._began)
        failed = f", {status.failed} failed" if status.failed else ""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done(status), pace=f"{pace}{failed}")
        elif now - self._spoke_at >= PLAIN_INTERVAL_SECONDS:
            self._spoke_at = now
            ended = f"{done(status)}/{status.requests} requests{failed}"
            self._console.print(f"{visible(status.name)}: {ended}, {pace}", soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Spent:
    """What working on a job took here: seconds, and the tokens made in them."""

    seconds: float
    tokens: int

    def __str__(self) -> str:
        pace = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return f"{self.tokens:,} tokens in {duration(self.seconds)} here ({pace:,.0f} tokens/s)"


def print_job(status: JobStatus, points: Sequence[PointReport], *, most: int | None = None) -> None:
    """One job on stdout: its points as a table (`most` of them), then its totals."""
    shown = points[:most]
    made = table(shown)
    print_table(made.header, made.rows, left=made.n_labels)
    if len(shown) < len(points):
        say(f"... and {len(points) - len(shown)} points more: penstock status {status.id}")
    say("")
    open_requests = status.queued + status.running
    counts = [f"{status.succeeded} succeeded", f"{status.failed} failed"]
    counts += [f"{status.cancelled} cancelled"] if status.cancelled else []
    counts += [f"{open_requests} open"] if open_requests else []
    say(f"job {status.id} ({status.name}, model {status.model}): {status.state}")
    say(f"requests: {', '.join(counts)}")
    tokens = f"tokens: {status.prompt_tokens:,} prompt, {status.completion_tokens:,} completion"
    say(tokens + (f", {status.replayed_tokens:,} replayed" if status.replayed_tokens else ""))
    if status.cancel_reason:
        say(f"cancelled: {status.cancel_reason}")
    elif status.deadline_at and open_requests:
        say(f"deadline: {status.deadline_at:%Y-%m-%d %H:%M:%S} UTC")


def print_failures(requests: Sequence[RequestStatus]) -> None:
    """A line for each failed request, on stdout."""
    for request in requests:
        why = f"{request.error_code}: {request.error_message}"
        say(f"failed: request {request.id} ({request.custom_id}): {why}")


def print_further(status: JobStatus, database_url: str, request_id: int | None) -> None:
    """The exact lines that look further, on stdout."""
    where = f"WHERE job_id = '{status.id}' ORDER BY request_id, choice LIMIT 5"
    sql = f"SELECT custom_id, choice, text FROM request_text {where}"  # noqa: S608
    say("\nlook further:")
    for line in (
        f'{_sql_client(database_url)} "{sql}"',
        f"penstock status {status.id}",
        *([f"penstock tail {request_id}"] if request_id is not None else []),
        f"penstock export {status.id} -o {status.name}.jsonl",
    ):
        say(f"  {line}")


def _sql_client(database_url: str) -> str:
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        return f"sqlite3 {shlex.quote(url.database or '')}"
    plain = url.set(drivername="postgresql")._replace(password=None)  # psql asks for it
    return f"psql {shlex.quote(plain.render_as_string())} -c"


def print_jobs(jobs: Sequence[JobStatus]) -> None:
    """The newest jobs as a table on stdout."""
    header = (
        *("job", "name", "model", "state", "created (UTC)"),
        *("done", "requests", "failed", "tokens"),
    )
    rows = [
        (
            *(job.id, job.name, job.model, job.state, f"{job.created_at:%Y-%m-%d %H:%M:%S}"),
            *(str(n) for n in (done(job), job.requests, job.failed, job.completion_tokens)),
        )
        for job in jobs
    ]
    print_table(header, rows, left=5)


def print_workers(workers: Sequence[Worker]) -> None:
    """The fleet as a table on stdout; a dash where a worker has said nothing yet."""
    header = (
        *("worker", "host", "model", "device", "state", "seen (UTC)"),
        *("slots in use", "tokens/s", "memory"),
    )
    rows = [
        (
            *(each.id, f"{each.hostname}:{each.pid}", each.model, each.device),
            *("live" if each.alive else "not seen", f"{each.seen_at:%Y-%m-%d %H:%M:%S}"),
            f"{'-' if each.slots_used is None else each.slots_used} of {each.slots}",
            "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            "-" if each.memory_bytes is None else f"{each.memory_bytes / 2**20:,.0f} MiB",
        )
        for each in workers
    ]
    print_table(header, rows, left=6)


def print_plan(plan: Mapping[str, Any]) -> None:
    """A plan, described as plain JSON values, on stdout."""
    say(f"{plan['name']}: model {plan['model']}")
    bound = plan["max_total_tokens"]
    say(
        f"{plan['n_items']} items x {plan['n_points']} points = {plan['n_requests']} requests, "
        f"{plan['n_choices']} choices, "
        + ("no bound of tokens" if bound is None else f"at most {bound:,} completion tokens")
    )
    for point in plan["points"][:SHOWN_POINTS]:
        say(f"  point {point['position']}: {json.dumps(point['params'], ensure_ascii=False)}")
    if (left := len(plan["points"]) - SHOWN_POINTS) > 0:
        say(f"  ... and {left} points more")
    for example in plan["examples"]:
        say(f"item {example['custom_id']}:")
        for message in example["messages"]:
            say(f"  {message['role']}: {_spoken(message)}")


def _spoken(message: Mapping[str, Any]) -> str:
    """What a message says; a call as `name(arguments)`."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    calls += [call] if (call := message.get("function_call")) else []
    content = message.get("content")
    said = [] if content is None else [str(content)]
    return "; ".join(said + [f"{call['name']}({call['arguments']})" for call in calls])


class Counter:
    """How far a long export is, on stderr, every few seconds."""

    def __init__(self, verb: str, total: int) -> None:
        self._verb, self._total, self._spoke_at = verb, total, time.monotonic()

    def show(self, count: int) -> None:
        """Say it if it is time to."""
        if time.monotonic() - self._spoke_at >= PLAIN_INTERVAL_SECONDS:
            self._spoke_at = time.monotonic()
            talk(f"{self._verb} {count} of {self._total}")


def log_handler() -> logging.Handler:
    """Log lines on stderr, above the live progress where there is one."""
    screen = console(sys.stderr)
    if screen.is_terminal:
        return RichHandler(console=screen, show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    return handler


def say(line: str) -> None:
    """A line of the answer, on stdout; control characters escaped."""
    console(sys.stdout).print(visible(line), soft_wrap=True)


def talk(line: str) -> None:
    """A line beside the answer, on stderr."""
    console(sys.stderr).print(visible(line), soft_wrap=True)
