"""The command `bench`: how fast a model is on this machine, and what it could be at most.

Composes `bench` and `ceilings` of `workers.measuring`; stdout is the answer, stderr the talk
beside it. Knows how the options are spelt; `workers` is imported only inside the functions.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.bench_table import print_bench
from orchestrator.errors import SpecError
from orchestrator.fleet import DeviceOption
from orchestrator.models import DirArgument, find_folder
from orchestrator.reading import JsonOption, print_json
from orchestrator.settings import Settings
from orchestrator.terminal import talk

if TYPE_CHECKING:
    from workers.folders.folder import ModelFolder
    from workers.loading.model import LoadedModel
    from workers.measuring.bench import Work
    from workers.measuring.ceilings import Ceilings
    from workers.measuring.costs import Costs
    from workers.running.machine import Machine

_ROWS, _QUICK_ROWS = (1, 2, 4, 8, 16, 32), (1, 8)
_PROMPTS, _QUICK_PROMPTS = (32, 128, 512, 2048), (32, 128)
_SECONDS, _QUICK_SECONDS = 40.0, 6.0
_HELD = 128
_LEAST_ROOM = 16  # tokens of a row

RowsOption = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Numbers of rows that decode together.")
]
PromptsOption = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Lengths of prompts, in tokens.")
]
SecondsOption = Annotated[
    float | None, typer.Option(min=1, max=3600, metavar="S", help="Time for measuring, about.")
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Fewer rows and prompts, a few seconds.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, max=4096, metavar="N", help="Threads of a step.  [PENSTOCK_THREADS]"),
]
SlotsOption = Annotated[
    int | None,
    typer.Option(min=1, max=4096, metavar="N", help="Rows to load with.  [PENSTOCK_SLOTS]"),
]
CalibrateOption = Annotated[
    bool,
    typer.Option("--calibrate", help="Choose threads, spinning and slots anew, and keep them."),
]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options, read; None: as many as the machine has room for."""

    rows: tuple[int, ...] | None
    prompts: tuple[int, ...] | None
    seconds: float
    quick: bool

    def work(self, slots: int, max_length: int, capacity: int) -> Work:
        """What is measured with so many rows, of that length, that hold so much together.

        Raises SpecError for what does not fit.
        """
        from workers.measuring.bench import Work

        most = min(slots, capacity // _LEAST_ROOM)
        rows = self.rows or _up_to(_QUICK_ROWS if self.quick else _ROWS, most)
        prompts = self.prompts or _up_to(_QUICK_PROMPTS if self.quick else _PROMPTS, max_length - 1)
        if max(rows) > most:
            raise SpecError("--rows", f"at most {most}, for which there is memory", str(max(rows)))
        if max(prompts) >= max_length:
            expected = f"less than the context of {max_length} tokens (PENSTOCK_MAX_CONTEXT)"
            raise SpecError("--prompts", expected, str(max(prompts)))
        room = min(max_length, capacity // max(rows))
        held, every = min(_HELD, room // 2), self.prompts is not None
        return Work(rows, prompts, self.seconds, held=held, every=every)


def bench(
    model: DirArgument,
    rows: RowsOption = None,
    prompts: PromptsOption = None,
    seconds: SecondsOption = None,
    quick: QuickOption = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    slots: SlotsOption = None,
    calibrate: CalibrateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model here: tokens/s by concurrency, prompts, memory, and the machine's ceilings.

    Also `penstock models bench`. Example: penstock bench models/llama
    Example: penstock models bench models/llama
    """
    asked = Asked(
        _numbers("--rows", rows),
        _numbers("--prompts", prompts),
        seconds or (_QUICK_SECONDS if quick else _SECONDS),
        quick,
    )
    settings = Settings.from_env()
    settings = replace(settings, threads=threads or settings.threads)
    found = find_folder(model, settings)
    loaded = _load(found, settings, slots or max(asked.rows or (0,)), device, calibrate)
    shown = _measure(loaded, settings, asked)
    print_json(shown) if as_json else print_bench(shown)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers between commas, each once, in order; raises SpecError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 1 <= len(part) <= 7 for part in parts):
        raise SpecError(option, "whole numbers between commas, such as 1,4,8", repr(text))
    values = sorted({int(part) for part in parts})
    if values[0] < 1:
        raise SpecError(option, "numbers of at least 1", repr(text))
    return tuple(values)


def _up_to(values: Sequence[int], most: int) -> tuple[int, ...]:
    return tuple(value for value in values if value <= most) or (most,)


def _load(
    folder: ModelFolder, settings: Settings, slots: int, device: str, calibrate: bool
) -> LoadedModel:
    from workers.loading.model import LoadedModel

    talk(f"loading {folder.name}")
    loaded = LoadedModel.load(folder, settings, slots=slots or None, device=device, renew=calibrate)
    talk(loaded.runner.device_line)
    return loaded


def _measure(loaded: LoadedModel, settings: Settings, asked: Asked) -> dict[str, Any]:
    """Everything that is shown, as JSON has it."""
    from workers.drawing.device_sampler import sampler_of
    from workers.engine.engine import Engine
    from workers.measuring import bench
    from workers.running.machine import Others, this_machine
    from workers.running.memory import resident_bytes

    runner, machine = loaded.runner, this_machine()
    work, resident = asked.work(runner.slots, runner.max_length, runner.capacity), resident_bytes()
    others, found = Others(), _ceilings(loaded, machine)
    sampler = sampler_of(runner, loaded.tokenizer.vocab_size)

    def engine() -> Engine:
        return Engine(
            runner,
            loaded.tokenizer,
            frozenset(),  # nothing ends early
            sampler,
            max_stall=settings.max_stall_ms / 1e3,
            prefix_bytes=0,
            least_chunk=loaded.calibration.chunk,
        )

    vocab = min(loaded.tokenizer.vocab_size, runner.vocab_size)
    decode = bench.bench_decode(runner, engine, vocab, work, talk)
    prefill = bench.bench_prefill(runner, engine, vocab, work, talk)
    if found is not None and (again := _ceilings(loaded, machine)) is not None:
        found = found.best(again)
        floor = bench.Floor(_costs(loaded.folder), found, runner.kv_bytes_per_token)
        decode = [floor.decode(each, work.held) for each in decode]
        prefill = [floor.prefill(each) for each in prefill]
    return {
        **_facts(loaded, machine, found),
        "memory": _memory(loaded, resident),
        "held_tokens": work.held,
        "decode": [asdict(each) for each in decode],
        "prefill": [asdict(each) for each in prefill],
        "others_share": others.share(),
    }


def _ceilings(loaded: LoadedModel, machine: Machine) -> Ceilings | None:
    """Of the host's processors; None where the model runs on something else."""
    from workers.measuring import ceilings

    if loaded.runner.device != "cpu":
        return None
    talk("the machine's ceilings")
    return ceilings.measure(machine, loaded.runner.threads, _open_session)


def _open_session(graph: bytes, threads: int, spinning: bool) -> Any:
    from workers.running.host import open_session

    return open_session(graph, threads=threads, spinning=spinning)


def _costs(folder: ModelFolder) -> Costs:
    import onnx

    from workers.measuring.costs import step_costs

    return step_costs(onnx.load(str(folder.graph), load_external_data=False).graph)


def _facts(loaded: LoadedModel, machine: Machine, found: Ceilings | None) -> dict[str, Any]:
    packages = {"penstock": version("penstock"), "onnxruntime": machine.runtime}
    return {
        "model": loaded.folder.name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**packages, "numpy": version("numpy"), "python": platform.python_version()},
        "machine": asdict(machine),
        "device": loaded.runner.device_line,
        "calibration": asdict(loaded.calibration),
        "ceilings": asdict(found) if found else None,
    }


def _memory(loaded: LoadedModel, resident: int) -> dict[str, int]:
    runner = loaded.runner
    return {
        "resident_bytes": resident,
        "kv_bytes_per_token": runner.kv_bytes_per_token,
        "kv_bytes_per_slot": runner.kv_bytes_per_token * runner.max_length,
        "slots": runner.slots,
        "context_length": runner.max_length,
        "capacity_tokens": runner.capacity,
    }
