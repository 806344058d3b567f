"""A model from a Hugging Face folder or hub name, through onnxruntime-genai's builder.

Judged first (sources.py, options.py), built by a program in an environment of its own
(environment.py, builder.py), into a hidden folder beside the wanted one that is renamed when it is
whole and prepared: what is interrupted leaves nothing that looks like a model. Knows nothing of
sessions: the self-test of the result is measuring/selftest.py's.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Conflict, NotFound, SpecError, WorkerError
from workers.building.environment import REQUIREMENTS, builder_python
from workers.building.options import builder_options
from workers.building.program import Failed, run
from workers.building.sources import Source, check_kernels
from workers.folders.configs import read_object
from workers.folders.folder import ModelFolder
from workers.folders.prepare import prepare
from workers.folders.row_quantized import quantize

Told = Callable[[str], None]
_HERE = Path(__file__).parent
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What belongs to a model beside its graph; the source's own wins over what the builder writes anew.
_TAKEN = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_STEPS = (
    "Reading ",
    "Saving ",
    "WARNING",
    "Adding ",
    "Loading ",
)  # what the builder says of itself
RECORD = "penstock-import.json"


@dataclass(frozen=True, slots=True)
class Import:
    """What is asked for. `extras` are `key=value` for the builder."""

    source: str
    precision: str
    device: str
    output: Path
    extras: tuple[str, ...] = ()
    force: bool = False
    builder_python: Path | None = None  # an environment that has the builder; None: our own


def import_model(asked: Import, cache: Path, told: Told) -> ModelFolder:
    """Make `asked.output` from the source; what is done is told, line by line.

    Raises SpecError and NotFound for what cannot be imported so, Conflict where the folder exists
    or another import makes it, WorkerError `builder` where the build fails or has no room.
    """
    _check_words(asked)
    output = asked.output.absolute()
    _check_output(output, asked.force)
    source = _on_disk(asked.source)
    if source is not None:
        options = _judged(source, asked)
    python = asked.builder_python or builder_python(cache, told, REQUIREMENTS)
    if source is None:
        source = _from_hub(asked.source, python, cache, told)
        options = _judged(source, asked)
    with _work_folder(output) as work:
        made = work / "model"
        _check_room(work, source.bytes_needed(asked.precision))
        # What a hub sent is kept for the next time; what the builder writes on its way is not.
        scratch = work / "scratch" if source.local else cache / "hub"
        told(f"building {source.name} in {asked.precision} for {asked.device}")
        built = work / "fp32" if asked.precision == "w8a8" else made
        _build(source, [str(python), *_words(asked, source, options, built, scratch)], told)
        if built is not made:
            _quantize(source, built, made, told)
        _take_along(source, made)
        _check_words_of(source, made, told)
        _write_record(asked, options, made)
        told(f"prepared {prepare(made).name}")
        _put_in_place(work, output)
    return ModelFolder.load(output)


def _check_words(asked: Import) -> None:
    """What is wrong whatever the model is, before a hub is asked for it."""
    check_kernels(asked.precision, asked.device)
    builder_options(asked.precision, asked.device, "", asked.extras)
    python = asked.builder_python
    if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
        raise SpecError("--builder-python", "a Python interpreter", repr(str(python)))


def _check_output(output: Path, force: bool) -> None:
    """Only what is plainly a model is ever replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "genai_config.json").is_file():
        raise Conflict("folder", str(output), "it exists, and is no model: name another")
    if not force:
        raise Conflict("model folder", str(output), "it exists: --force replaces it")


def _on_disk(source: str) -> Source | None:
    """The folder; None for what must be a hub's name. Raises SpecError, NotFound."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SpecError(source, "a Hugging Face folder with config.json", "none in it")
        return Source(source, path.resolve(), local=True)
    if path.exists():
        raise SpecError(source, "a Hugging Face folder", f"a file ({path.suffix or 'no suffix'})")
    if not _HUB_NAME.fullmatch(source) or source.startswith("."):
        raise NotFound("folder", source)
    return None


def _judged(source: Source, asked: Import) -> dict[str, str]:
    """The builder's options, if the source can be imported so; raises SpecError."""
    source.check()
    return builder_options(asked.precision, asked.device, source.architecture, asked.extras)


def _from_hub(name: str, python: Path, cache: Path, told: Told) -> Source:
    """The hub's config.json alone, so that a refusal comes before the weights do."""
    told(f"asking the hub for {name}")
    said: list[str] = []
    try:
        run([str(python), str(_HERE / "hub.py"), name, str(cache / "hub")], said.append)
        answer = json.loads(said[-1])
    except (Failed, ValueError, IndexError) as error:
        raise WorkerError("builder", f"{python} cannot ask a hub: {error}") from error
    if "path" not in answer:
        how = "a Hugging Face folder on disk does as well: penstock models import PATH ..."
        raise WorkerError("builder", f"{name}: {answer.get('error')}; {how}")
    return Source(name, Path(answer["path"]).parent, local=False)


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """An empty hidden folder beside `output`, ours alone; gone at the end, whatever happens."""
    work = output.parent / f".{output.name}.importing"
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work, output):
        try:
            _clear(work, output)
            yield work
        finally:
            _clear(work, output)
            work.rmdir()


@contextmanager
def _locked(work: Path, output: Path) -> Iterator[None]:
    lock = os.open(work, os.O_RDONLY)
    try:
        if not _is_ours(lock, work):
            raise Conflict("model folder", str(output), "another import is making it")
        yield
    finally:
        os.close(lock)


def _is_ours(lock: int, work: Path) -> bool:
    """False while another has it, and where that one has just renamed or removed it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return work.exists() and os.path.samestat(os.fstat(lock), work.stat())


def _clear(work: Path, output: Path) -> None:
    """Empty `work`; a model that was moved aside there, and is missed, goes back."""
    if (work / "old").exists() and not output.exists():
        (work / "old").rename(output)
    for each in work.iterdir():
        shutil.rmtree(each)


def _check_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        room = f"about {needed >> 20} MiB, {work.parent} has {free >> 20}"
        raise WorkerError("builder", f"the model needs {room}: make room, or name another -o")


def _words(
    asked: Import, source: Source, options: dict[str, str], made: Path, scratch: Path
) -> list[str]:
    """The builder's command line, after the interpreter."""
    given = ["-i", str(source.folder)] if source.local else ["-m", source.name]
    precision = "fp32" if asked.precision == "w8a8" else asked.precision
    kind = ["-p", precision, "-e", asked.device]
    extras = [f"{key}={value}" for key, value in options.items()]
    words = [*given, "-o", str(made), *kind, "-c", str(scratch), "--extra_options", *extras]
    return [str(_HERE / "builder.py"), *words]


def _build(source: Source, command: list[str], told: Told) -> None:
    try:
        run(command, lambda line: _tell_step(line, told))
    except Failed as failed:
        for line in failed.lines:
            told(f"  {line}")
        raise WorkerError("builder", f"the builder failed on {source.name}: {failed}") from failed


def _quantize(source: Source, built: Path, made: Path, told: Told) -> None:
    """What was built in fp32 as w8a8, all else as it is."""
    made.mkdir()
    try:
        told(f"quantized {quantize(built / 'model.onnx', made)} matrices")
    except ValueError as error:
        raise WorkerError("builder", f"{source.name}: {error}") from error
    for file in [each for each in built.iterdir() if "onnx" not in each.name]:
        file.rename(made / file.name)
    shutil.rmtree(built)


def _tell_step(line: str, told: Told) -> None:
    if line.startswith(_STEPS) and "%|" not in line and "it/s" not in line:
        told(f"builder: {line.partition(' in /')[0]}")


def _take_along(source: Source, made: Path) -> None:
    for pattern in _TAKEN:
        for file in sorted(source.folder.glob(pattern)):
            target = made / file.relative_to(source.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _check_words_of(source: Source, made: Path, told: Told) -> None:
    if not (made / "tokenizer.json").is_file():
        raise WorkerError("builder", f"{source.name}: no tokenizer.json, nor could one be made")
    config = made / "tokenizer_config.json"
    inside = config.is_file() and "chat_template" in read_object(config)
    if not inside and not (made / "chat_template.jinja").is_file():
        told("it has no chat template (a base model?): jobs need chat_template.jinja in its folder")


def _write_record(asked: Import, options: dict[str, str], made: Path) -> None:
    """Where the model came from, for people; nothing of it differs between two machines."""
    name = Path(asked.source).name if Path(asked.source).is_dir() else asked.source
    record = {
        "source": name,
        "precision": asked.precision,
        "device": asked.device,
        "options": options,
    }
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _put_in_place(work: Path, output: Path) -> None:
    if output.exists():
        output.rename(work / "old")
    (work / "model").rename(output)
