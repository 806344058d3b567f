"""The commands about the models of this machine: list, prepare, check; and how one is loaded.

`cli.py` gives them their names. Stdout is the answer, stderr the talk beside it. Knows nothing of
jobs; `workers` is imported only inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator import terminal
from orchestrator.errors import WorkerError
from orchestrator.fleet import DeviceOption
from orchestrator.reading import JsonOption, print_json
from orchestrator.settings import Settings
from orchestrator.terminal import say, talk

if TYPE_CHECKING:
    from workers.folder import BrokenFolder, ModelFolder
    from workers.model import LoadedModel

DirArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="A model's folder, or a name that `list` shows.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The folder of the job's model, if not found by its name."),
]
_COLUMNS = ("name", "context_length", "vocab_size", "layers", "path")


@dataclass(frozen=True, slots=True)
class Place:
    """Where to run a job's model: its folder, if not found by name, how many slots, what device."""

    model: str | None
    slots: int | None
    device: str

    def load(self, name: str, settings: Settings) -> LoadedModel:
        """The model in memory under the job's name for it; raises NotFound, WorkerError."""
        from workers.model import LoadedModel

        folder = replace(find_folder(self.model or name, settings), name=name)
        loaded = LoadedModel.load(folder, settings, slots=self.slots, device=self.device)
        talk(loaded.runner.device_line)
        return loaded


def find_folder(model: str, settings: Settings) -> ModelFolder:
    """The model's folder by its path or its name; raises NotFound, WorkerError."""
    from workers.folder import find_model

    return find_model(model, settings.models_dir)


def list_models(as_json: JsonOption = False) -> None:
    """Show the models that a job can name here, and what is wrong with those that it cannot.

    Example: penstock models list
    """
    from workers import folder

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


def prepare(folder: DirArgument) -> None:
    """Edit a model's graph for batches of rows of different lengths; the original stays.

    Done by itself on first use. Example: penstock models prepare models/llama
    """
    from workers import prepare

    settings = Settings.from_env()
    say(str(prepare.prepare(find_folder(folder, settings).path, settings.cache_dir)))


def check(folder: DirArgument, device: DeviceOption = "cpu", as_json: JsonOption = False) -> None:
    """Load a model and compute one prompt; exits 1 with the reason if it cannot run here.

    Example: penstock models check models/llama
    """
    settings = Settings.from_env()
    found = find_folder(folder, settings)
    loaded = Place(None if folder == found.name else folder, 1, device).load(found.name, settings)
    _try_out(loaded)
    facts = {
        "name": found.name,
        "path": str(found.path),
        "context_length": loaded.runner.max_length,
        "vocab_size": found.vocab_size,
        "end_tokens": sorted(loaded.eos),
        "kv_bytes_per_slot": loaded.runner.kv_bytes_per_slot,
        "system_fingerprint": loaded.fingerprint,
    }
    if as_json:
        print_json(facts)
    else:
        terminal.print_table(("fact", "value"), [[k, str(v)] for k, v in facts.items()], left=2)


def _try_out(loaded: LoadedModel) -> None:
    """One prompt through its template, its tokenizer and a step. Raises WorkerError."""
    prompt = loaded.tokenizer.encode(loaded.template.render([{"role": "user", "content": "Hello"}]))
    logits = loaded.runner.prefill(0, prompt[: loaded.runner.max_length] or [0])
    if not bool((logits == logits).all()):
        where = f"model folder {loaded.folder.path}"
        raise WorkerError("model", f"{where}: it computes logits that are no numbers")
