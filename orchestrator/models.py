"""The commands about the models of this machine: list, import, prepare, check; loading one.

`cli.py` gives them their names. Stdout is the answer, stderr the talk beside it. Knows nothing of
jobs; `workers` is imported only inside the functions.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator import checking, terminal
from orchestrator.errors import SpecError
from orchestrator.fleet import DeviceOption
from orchestrator.reading import JsonOption, print_json
from orchestrator.settings import Settings
from orchestrator.terminal import say, talk

if TYPE_CHECKING:
    from workers.folders.folder import BrokenFolder, ModelFolder
    from workers.loading.model import LoadedModel

DirArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="A model's folder, or a name that `list` shows.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The folder of the job's model, if not found by its name."),
]
GraphOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which of an export's graphs; remembered in its folder."),
]
CHECKED_SLOTS = 8
_COLUMNS = ("name", "context_length", "vocab_size", "layers", "path")


@dataclass(frozen=True, slots=True)
class Place:
    """Where to run a job's model: its folder, if not found by name, and what device."""

    model: str | None
    device: str

    def load(self, name: str, settings: Settings) -> LoadedModel:
        """The model in memory under the job's name for it; raises NotFound, WorkerError."""
        from workers.loading.model import LoadedModel

        folder = replace(find_folder(self.model or name, settings), name=name)
        loaded = LoadedModel.load(folder, settings, device=self.device)
        talk(loaded.runner.device_line)
        return loaded


def find_folder(model: str, settings: Settings) -> ModelFolder:
    """The model's folder by its path or its name; raises NotFound, WorkerError."""
    from workers.folders.folder import find_model

    return find_model(model, settings.models_dir)


def list_models(as_json: JsonOption = False) -> None:
    """Show the models that a job can name here, and what is wrong with those that it cannot.

    Example: penstock models list
    """
    from workers.folders import folder

    rows = [_row(each) for each in folder.list_models(Settings.from_env().models_dir)]
    if as_json:
        print_json(rows)
        return
    whole = [row for row in rows if row["error"] is None]
    terminal.print_table(_COLUMNS, [[str(row[name]) for name in _COLUMNS] for row in whole])
    for row in rows:
        if row["error"] is not None:
            say(f"broken: {row['name']}: {row['error']}")


def _row(folder: ModelFolder | BrokenFolder) -> Mapping[str, object]:
    """All columns and `error`; null what is not known."""
    facts = asdict(folder)
    return {name: facts.get(name) for name in (*_COLUMNS, "error")}


def prepare(folder: DirArgument, graph: GraphOption = None) -> None:
    """Edit a model's graph for batches of rows of different lengths; the original stays.

    Done by itself on first use. Example: penstock models prepare models/llama
    """
    from workers.folders import prepare

    settings = Settings.from_env()
    say(str(prepare.prepare(_chosen(folder, graph, settings).path, settings.cache_dir)))


def _chosen(folder: str, graph: str | None, settings: Settings) -> ModelFolder:
    """The folder, its graph chosen and remembered where a name for it was given."""
    from workers.folders import exports

    if graph is not None:
        places = (settings.models_dir / folder, Path(folder))
        path = next((each for each in places if exports.is_export(each)), None)
        if path is None:
            raise SpecError("--graph", "a folder with several graphs (an export)", repr(folder))
        exports.choose(path, graph)
    return find_folder(folder, settings)


def check(
    folder: DirArgument,
    device: DeviceOption = "cpu",
    graph: GraphOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try a model on a device: does it keep the engine's laws, how fast is it, what can it do?

    Exits 1 with the reason if it cannot run here, or if a law does not hold.
    Example: penstock models check models/llama
    """
    settings = Settings.from_env()
    found = _chosen(folder, graph, settings)
    loaded = _load(found, folder, device, settings, CHECKED_SLOTS)
    report = checking.report(loaded)
    print_json(report) if as_json else checking.print_report(report)
    checking.raise_broken(report, found)


def _load(
    found: ModelFolder, given: str, device: str, settings: Settings, slots: int
) -> LoadedModel:
    model = None if given == found.name else given
    return Place(model, device).load(found.name, replace(settings, slots=slots))


def import_model(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A Hugging Face folder, or a name on the hub.")
    ],
    precision: Annotated[
        str, typer.Option(metavar="P", help="fp32, fp16, bf16, int8, w8a8 or int4.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to make.")
    ],
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="What it is built for: cpu or cuda.")
    ] = "cpu",
    extra: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the builder; may be given again."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that is there already.")
    ] = False,
    builder_python: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A Python that has the builder, in place of our own."),
    ] = None,
) -> None:
    """Make a model of a Hugging Face folder, or of a name on the hub, and try it.

    Example: penstock models import downloads/Llama --precision int4 -o models/llama
    """
    from workers.building.importing import Import, import_model

    settings = Settings.from_env()
    asked = Import(source, precision, device, output, tuple(extra or ()), force, builder_python)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        made = import_model(asked, settings.cache_dir, talk)
    except KeyboardInterrupt:
        again = shlex.join(["penstock", *sys.argv[1:]])
        talk(f"stopped; nothing was left in {output}; begin again with: {again}")
        raise typer.Exit(130) from None
    say(str(output))
    checking.try_imported(made, device, settings)
    talk(f"next: {shlex.join(['penstock', 'models', 'check', str(output), '--device', device])}")
    talk(f"then: {shlex.join(['penstock', 'run', 'JOB.yaml', '--model', str(output)])}")
