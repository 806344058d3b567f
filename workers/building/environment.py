"""The environment of the model builder: a venv of its own in the cache, made once.

Of its own, because onnxruntime-genai needs `onnxruntime`, which owns the same module as
`onnxruntime-gpu` here: one installed over the other breaks it. A half-made one is made anew, and
of two that want it at once one waits. Knows nothing of models.
"""

import fcntl
import hashlib
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import WorkerError
from workers.building.program import Failed, run

REQUIREMENTS = Path(__file__).parent / "builder-requirements.txt"
NEEDED_BYTES = 3 * 2**30  # with torch's build for the CPU; its CUDA build needs 4 GB more
_MADE = "made"  # written last
_STEPS = ("Collecting ", "Downloading ", "Installing ", "Successfully ")  # what pip says it does


def builder_python(
    cache: Path, told: Callable[[str], None], requirements: Path = REQUIREMENTS
) -> Path:
    """The Python of the environment with `requirements`, made now or found in `cache`.

    Raises WorkerError `builder` if it cannot be made: no network, no room.
    """
    facts = requirements.read_bytes() + platform.python_version().encode()
    place = cache.resolve() / "builder" / hashlib.sha256(facts).hexdigest()[:12]
    place.parent.mkdir(parents=True, exist_ok=True)
    python = place / "bin" / "python"
    with _locked(place.with_suffix(".lock"), told):
        if not (place / _MADE).is_file():
            _check_room(place.parent)
            told(f"making the builder's environment, once, in {place}")
            _make(place, python, requirements, told)
            (place / _MADE).touch()
    return python


def _make(place: Path, python: Path, requirements: Path, told: Callable[[str], None]) -> None:
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    try:
        run([sys.executable, "-m", "venv", "--clear", str(place)], told)
        run([*pip, "-r", str(requirements)], lambda line: _tell_step(line, told))
    except Failed as failed:
        said = next((x for x in reversed(failed.lines) if "ERROR" in x), str(failed))
        raise WorkerError(
            "builder",
            f"the builder's environment cannot be made: {said}; where there is no network, give "
            f"one that has what {requirements} lists: --builder-python PATH",
        ) from failed


def _tell_step(line: str, told: Callable[[str], None]) -> None:
    if line.startswith(_STEPS):
        told(f"pip: {line.partition(' (')[0]}")


def _check_room(place: Path) -> None:
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise WorkerError(
            "builder",
            f"the builder's environment needs {NEEDED_BYTES >> 20} MiB, {place} has {free >> 20}: "
            "make room, or set PENSTOCK_CACHE_DIR",
        )


@contextmanager
def _locked(file: Path, told: Callable[[str], None]) -> Iterator[None]:
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told("another import makes the builder's environment: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
