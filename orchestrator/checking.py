"""What `penstock models check` shows: laws, speed, memory and features of a loaded model.

Composes `workers.measuring.selftest` and `workers.loading.features`; decides nothing about
how a law is tried. `workers` is imported only inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator import terminal
from orchestrator.errors import RequestError, WorkerError
from orchestrator.settings import Settings
from orchestrator.terminal import say, talk

if TYPE_CHECKING:
    from workers.folders.folder import ModelFolder
    from workers.loading.model import LoadedModel
    from workers.measuring.selftest import Law

_HELLO = ({"role": "user", "content": "Hello"},)
_NUMBERS = "logits are numbers"
_NO_CALLS = "no: its form of calls is not known (penstock.json: tool_format)"


def report(loaded: LoadedModel) -> dict[str, Any]:
    """Everything that is shown, as JSON has it; raises WorkerError where nothing can run."""
    from workers.loading import features
    from workers.measuring import selftest

    runner, folder = loaded.runner, loaded.folder
    _render(loaded)
    vocab = min(folder.vocab_size, runner.vocab_size)
    laws = selftest.try_laws(runner, vocab)
    speed = selftest.measure(runner, vocab)
    words = features.wording_facts(loaded.wording)
    shown = features.Features.of(folder, runner.graph)
    return {
        "name": folder.name,
        "path": str(folder.path),
        "graph": folder.graph.name,
        "device": runner.device_line,
        "context_length": runner.max_length,
        "vocab_size": folder.vocab_size,
        "end_tokens": sorted(loaded.eos),
        "slots": runner.slots,
        "kv_bytes_per_token": runner.kv_bytes_per_token,
        "kv_bytes_per_slot": runner.kv_bytes_per_token * runner.max_length,
        "system_fingerprint": loaded.fingerprint,
        "features": asdict(shown) | words,
        "supported": {
            "chat": "yes",
            "tools": words["tool_calls"] or _NO_CALLS,
            "schemas": "yes",
            "pictures and sound": "no",
        },
        "invariant": runner.place.invariant,
        "laws": [asdict(law) | {"holds": law.holds} for law in laws],
        "prefill_tokens_per_second": round(speed.prefill, 1),
        "decode_tokens_per_second": {str(n): round(v, 1) for n, v in speed.decode.items()},
    }


def _render(loaded: LoadedModel) -> None:
    """The template on the smallest conversation; a model that cannot say hello serves no job."""
    try:
        prompt = loaded.tokenizer.encode(loaded.template.render(_HELLO))
    except RequestError as error:
        raise WorkerError("model", f"model folder {loaded.folder.path}: {error}") from error
    if not prompt:
        where = f"model folder {loaded.folder.path}"
        raise WorkerError("model", f"{where}: its chat template makes an empty prompt")


def print_report(shown: Mapping[str, Any]) -> None:
    """Facts, then laws, each a table on stdout."""
    facts = [
        [key, str(value)] for key, value in shown.items() if not isinstance(value, dict | list)
    ]
    facts += [[key, str(value or "none")] for key, value in shown["features"].items()]
    facts += [[f"supported: {key}", value] for key, value in shown["supported"].items()]
    rates = shown["decode_tokens_per_second"].items()
    facts += [[f"decode_tokens_per_second, rows: {rows}", str(rate)] for rows, rate in rates]
    terminal.print_table(("fact", "value"), facts, left=2)
    say("")
    laws = [[law["name"], _said(law)] for law in shown["laws"]]
    terminal.print_table(("law", "here"), laws, left=2)


def _said(law: Mapping[str, Any]) -> str:
    if law["holds"]:
        return "holds" if law["tried"] else "not tried: too few slots, or too short a context"
    return f"BROKEN: logits differ by up to {law['difference']:g} ({law['where']})"


def raise_broken(shown: Mapping[str, Any], folder: ModelFolder) -> None:
    """WorkerError `model` that names the laws that do not hold, where the device promises them."""
    broken = [law["name"] for law in shown["laws"] if not law["holds"]]
    _raise(broken, shown["invariant"], folder)


def _raise(broken: list[str], invariant: bool, folder: ModelFolder) -> None:
    if not broken:
        return
    what = f"model folder {folder.path}: does not hold here: {'; '.join(broken)}"
    if invariant or _NUMBERS in broken:
        raise WorkerError("model", what)
    talk(f"{what}; this device promises it with PENSTOCK_DETERMINISTIC=1 only (docs/gpu.md)")


def try_imported(made: ModelFolder, device: str, settings: Settings) -> None:
    """The laws on two rows, shortly; says so where the device is not on this machine.

    Raises WorkerError where the model cannot run, or a law does not hold.
    """
    from workers.loading.model import LoadedModel
    from workers.measuring.selftest import try_laws

    try:
        loaded = LoadedModel.load(made, settings, slots=2, device=device)
    except WorkerError as error:
        if error.code != "device":
            raise
        talk(f"not tried here: {error}")
        return
    _render(loaded)
    laws: list[Law] = try_laws(loaded.runner, min(made.vocab_size, loaded.runner.vocab_size))
    broken = [law.name for law in laws if not law.holds]
    _raise(broken, loaded.runner.place.invariant, made)
    talk(f"tried: {len(laws) - len(broken)} laws hold, {loaded.runner.device_line}")
