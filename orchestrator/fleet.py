"""The commands of a machine in the fleet: worker; what others of them share.

`cli.py` gives them their names. Knows how their options are spelt; the work is done in
`workers.process`, imported only inside the commands.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.db.database import Database
from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.terminal import talk

if TYPE_CHECKING:
    from workers.folders.folder import ModelFolder

Beside = Callable[[Settings, Database, Queue], AbstractContextManager[object]]

ModelsOption = Annotated[
    list[str],
    typer.Option(
        "--model", metavar="DIR", help="A model's folder, or its name; may be given again."
    ),
]
SlotsOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Completions at a time, per model.  [PENSTOCK_SLOTS]"),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        min=16, metavar="N", help="Tokens a request may have, at most.  [PENSTOCK_MAX_CONTEXT]"
    ),
]
StallOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Milliseconds that running rows wait for a prompt.  [PENSTOCK_MAX_STALL_MS]",
    ),
]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N.")]
GraceOption = Annotated[
    float | None,
    typer.Option(
        min=0.1, metavar="S", help="Seconds to leave in after SIGTERM.  [PENSTOCK_GRACE_SECONDS]"
    ),
]
MetricsOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, metavar="P", help="Prometheus metrics on 127.0.0.1:P; 0: any free port."
    ),
]


def worker(
    model: ModelsOption,
    slots: SlotsOption = None,
    max_context: ContextOption = None,
    max_stall_ms: StallOption = None,
    device: DeviceOption = "cpu",
    grace: GraceOption = None,
    metrics_port: MetricsOption = None,
) -> None:
    """Work on whatever is queued for the models, until SIGTERM.

    Example: penstock worker --model tiny --slots 16
    """
    settings = with_given(
        Settings.from_env(),
        slots=slots,
        max_context=max_context,
        max_stall_ms=max_stall_ms,
        grace_seconds=grace,
    )
    raise typer.Exit(work(settings, model, device, metrics_port))


def work(
    settings: Settings,
    models: Sequence[str],
    device: str,
    metrics_port: int | None,
    *,
    beside: Beside | None = None,
) -> int:
    """Work until SIGTERM, with what `beside` opens for as long; the process's exit code.

    Raises NotFound, WorkerError.
    """
    from workers.folders.folder import find_model
    from workers.loading.model import LoadedModel
    from workers.process import FleetWorker

    folders = [find_model(each, settings.models_dir) for each in dict.fromkeys(models)]
    with Database.open(settings.database_url) as db, closing(Queue(settings)) as queue:
        queue.check_broker()
        # Each takes its share of what is free, though the first fills its own only later.
        share = replace(settings, memory_percent=max(1, settings.memory_percent // len(folders)))
        alone = len(folders) == 1
        loaded = [LoadedModel.load(each, share, device=device, alone=alone) for each in folders]
        for each in loaded:
            talk(f"model {each.folder.name}: {each.runner.device_line}")
        with beside(settings, db, queue) if beside else nullcontext():
            return FleetWorker(settings, db, queue, loaded, metrics_port=metrics_port).run()


def with_given(settings: Settings, **options: float | None) -> Settings:
    """The settings with the options that were given, named as the fields are."""
    given = {name: value for name, value in options.items() if value is not None}
    return replace(settings, **given)  # type: ignore[arg-type]


def stopped_by_signals() -> threading.Event:
    """Set by the first SIGTERM or SIGINT; the second one leaves at once."""
    stopped = threading.Event()

    def stop(number: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + number)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return stopped


def context_of(folder: ModelFolder, settings: Settings) -> int:
    """Tokens that a request may have: where it is worked on here, as far as this machine's memory
    reaches at all; what is free just now decides when the model is loaded."""
    from workers.running.memory import total_bytes
    from workers.running.sizing import longest_here

    if settings.broker_url.startswith("memory:"):
        return longest_here(folder, settings, total_bytes())
    return min(folder.context_length, settings.max_context)
