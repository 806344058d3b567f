"""The prepared graph of a model's folder: found, or made and written.

The edit itself is graph_edit.py's. The weights stay where they are: the edited graph is a small
file beside the original, or in the cache where the folder cannot be written; never the original.

Knows files and external data; nothing of operators, sessions or memory.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto

from orchestrator.errors import WorkerError
from workers.folders.configs import read_object
from workers.folders.files import write_whole
from workers.folders.folder import ModelFolder
from workers.folders.graph_edit import LAST, LENGTHS, POSITIONS, TOTAL, edit
from workers.folders.rope import switch_length

__all__ = ["LAST", "LENGTHS", "POSITIONS", "PREPARE_VERSION", "TOTAL", "prepare"]

PREPARE_VERSION = 2
_ALL_LAYERS = {"mistral", "phi3"}  # whose window, if the configuration has one, is every layer's


def prepare(path: Path, cache: Path | None = None, *, context: int | None = None) -> Path:
    """The path of the edited graph of the model folder `path`, made now or found.

    `context` positions are what a row may have at most (the model's own, if None): they decide
    between the two tables of a model with long rope, and the file's name tells which it was.
    Raises WorkerError naming the operator or input that is not supported, a truncated file, or
    external data that is missing, too short or outside the folder.
    """
    folder = ModelFolder.load(path)
    context = context or folder.context_length
    name = f"{folder.graph.stem}.penstock-v{PREPARE_VERSION}-{_digest(folder.graph)}"
    places = [folder.graph.parent, *([cache] if cache else [])]
    for place in places:
        if found := _find(place, name, context):
            return found
    model = _load(folder)
    _check_external_data(folder, model.graph)
    name += _choice(switch_length(model.graph), context) + ".onnx"
    edit(folder, model, context=context, window=_window(folder))
    for place in places:
        try:
            write_whole(place / name, model.SerializeToString(), mode=0o644)
            return place / name
        except OSError as error:
            refusal = error
    raise WorkerError("model", f"cannot write the prepared graph {name}: {refusal}")


def _choice(switch: int | None, context: int) -> str:
    """What a file's name tells of long rope: `-short4096` is for rows of up to 4096 positions."""
    if switch is None:
        return ""
    return f"-long{switch}" if context > switch else f"-short{switch}"


def _find(place: Path, name: str, context: int) -> Path | None:
    files = [file for file in place.glob("*.onnx") if file.name.startswith(name)]
    for file in files:
        kind = re.fullmatch(r"-(?:short|long)(\d+)", file.stem.removeprefix(name))
        if file.stem == name or (kind and file.stem == name + _choice(int(kind[1]), context)):
            return file
    return None


def _window(folder: ModelFolder) -> int:
    """The window that the builder's configuration tells of and its graph has in no layer, or 0.

    Version 0.18 of the builder forgets it where the model's configuration has no `layer_types`.
    """
    file = folder.path / "genai_config.json"
    model = read_object(file).get("model") if file.is_file() else None
    decoder = model.get("decoder") if isinstance(model, dict) else None
    told = decoder.get("sliding_window") if isinstance(decoder, dict) else None
    if not isinstance(model, dict) or not isinstance(told, dict):
        return 0
    window = told.get("window_size")
    forgotten = told.get("layers") == [] and model.get("type") in _ALL_LAYERS
    return window if forgotten and isinstance(window, int) and window > 0 else 0


def _load(folder: ModelFolder) -> ModelProto:
    try:
        model = onnx.load(str(folder.graph), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise WorkerError(
            "model", f"{folder.graph}: not a whole ONNX file (truncated?): {error}"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise WorkerError("model", f"{folder.graph}: not a whole ONNX file: it has no nodes")
    return model


def _check_external_data(folder: ModelFolder, graph: GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = PurePosixPath(entry.get("location", ""))
        file = folder.graph.parent / location
        outside = location.is_absolute() or ".." in location.parts or "\0" in str(location)
        if outside or not file.resolve().is_relative_to(folder.path):
            raise WorkerError(
                "model",
                f"{folder.graph}: weight {tensor.name!r} lies outside the folder: "
                f"{str(location)!r}",
            )
        if not file.is_file():
            raise WorkerError("model", f"{folder.graph}: weights file {location} is missing")
        needed = sum(_bytes(folder, tensor, entry.get(key, "0")) for key in ("offset", "length"))
        if file.stat().st_size < needed:
            raise WorkerError(
                "model",
                f"{file}: truncated: weight {tensor.name!r} ends at byte {needed}, "
                f"the file has {file.stat().st_size}",
            )


def _bytes(folder: ModelFolder, tensor: TensorProto, value: str) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise WorkerError(
            "model", f"{folder.graph}: weight {tensor.name!r} lies at {value!r}: no whole number"
        )
    return int(value)


def _digest(graph: Path) -> str:
    with graph.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
