"""The JSON files of a model's folder: read whole, or refused with the file and the key.

Knows nothing of what the keys mean.
"""

import json
from pathlib import Path

from orchestrator.errors import WorkerError


def refused(path: Path, why: str) -> WorkerError:
    """The error about the model's folder `path`."""
    return WorkerError("model", f"model folder {path}: {why}")


def read_object(file: Path) -> dict[str, object]:
    """The object in `file`; WorkerError `model` if it is absent, no JSON, or no object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refused(file.parent, f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise refused(file.parent, f"{file.name}: expected an object")
    return value


def section(file: Path, parent: dict[str, object], key: str) -> dict[str, object]:
    """The object under `key`; WorkerError `model` otherwise."""
    value = parent.get(key)
    if not isinstance(value, dict):
        raise refused(file.parent, f"{file.name}: {key}: expected an object, got {value!r}")
    return value


def number(file: Path, parent: dict[str, object], key: str) -> int:
    """The whole number from 1 under `key`; WorkerError `model` otherwise."""
    value = parent.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refused(file.parent, f"{file.name}: {key}: expected a whole number, got {value!r}")
    return value
