"""A model's folder, as the onnxruntime-genai builder makes it: what its files say.

Knows nothing of onnxruntime: it reads JSON, finds folders by name, and refuses what is not whole.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import NotFound, WorkerError

TINY = Path(__file__).parent / "models" / "tiny"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a runner needs to know of a model before it is loaded; sizes in elements."""

    name: str
    path: Path
    graph: Path
    context_length: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_size: int
    past_key: str
    past_value: str
    present_key: str
    present_value: str

    @classmethod
    def load(cls, path: Path, name: str | None = None) -> "ModelFolder":
        """Read `genai_config.json`; raises WorkerError naming the file or key that is wrong."""
        path = path.resolve()
        for required in ("genai_config.json", "tokenizer.json"):
            if not (path / required).is_file():
                raise _refused(path, f"{required} is missing: not an onnxruntime-genai folder")
        model = _section(path, _read_json(path / "genai_config.json"), "model")
        decoder = _section(path, model, "decoder")
        inputs, outputs = _section(path, decoder, "inputs"), _section(path, decoder, "outputs")
        filename = str(decoder.get("filename", "model.onnx"))
        graph = path / filename
        if "\0" in filename or graph.resolve().parent != path or not graph.is_file():
            raise _refused(path, f"decoder.filename {filename!r} is not a file of the folder")
        return cls(
            name=name or path.name,
            path=path,
            graph=graph,
            context_length=_number(path, model, "context_length"),
            vocab_size=_number(path, model, "vocab_size"),
            layers=_number(path, decoder, "num_hidden_layers"),
            kv_heads=_number(path, decoder, "num_key_value_heads"),
            head_size=_number(path, decoder, "head_size"),
            past_key=_pattern(path, inputs, "past_key_names", "past_key_values.%d.key"),
            past_value=_pattern(path, inputs, "past_value_names", "past_key_values.%d.value"),
            present_key=_pattern(path, outputs, "present_key_names", "present.%d.key"),
            present_value=_pattern(path, outputs, "present_value_names", "present.%d.value"),
        )

    def digest(self) -> str:
        """SHA-256 over every file that decides a logit or a token: weights, tokenizer, template."""
        whole = hashlib.sha256()
        for file in sorted(self.path.iterdir()):
            if file.is_file() and _counts(file):
                whole.update(file.name.encode() + b"\0")
                with file.open("rb") as stream:
                    whole.update(hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class BrokenFolder:
    """A folder that a builder began, and why it is no model."""

    name: str
    path: Path
    error: str


def find_model(name: str, models_dir: Path) -> ModelFolder:
    """The folder of `tiny`, of a name under `models_dir`, or of a path; NotFound otherwise."""
    if name == "tiny":
        return ModelFolder.load(TINY, "tiny")
    for path in (models_dir / name, Path(name)):
        if (path / "genai_config.json").is_file():
            return ModelFolder.load(path)
    if Path(name).is_dir():
        return ModelFolder.load(Path(name))
    raise NotFound("model", name)


def list_models(models_dir: Path) -> list[ModelFolder | BrokenFolder]:
    """The embedded model and every folder of `models_dir` that a builder made, by name."""
    found: list[ModelFolder | BrokenFolder] = [ModelFolder.load(TINY, "tiny")]
    if models_dir.is_dir():
        folders = sorted(path.parent for path in models_dir.glob("*/genai_config.json"))
        found += [_load_or_tell(folder) for folder in folders]
    return found


def _load_or_tell(folder: Path) -> ModelFolder | BrokenFolder:
    try:
        return ModelFolder.load(folder)
    except WorkerError as error:
        return BrokenFolder(folder.name, folder.resolve(), error.message)


def _counts(file: Path) -> bool:
    prepared = ".penstock-" in file.name
    return not prepared and (".onnx" in file.name or file.suffix in {".json", ".jinja"})


def _refused(path: Path, why: str) -> WorkerError:
    return WorkerError("model", f"model folder {path}: {why}")


def _read_json(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(file.parent, f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise _refused(file.parent, f"{file.name}: expected an object")
    return value


def _section(path: Path, parent: dict[str, object], key: str) -> dict[str, object]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise _refused(path, f"genai_config.json: {key}: expected an object, got {value!r}")
    return value


def _pattern(path: Path, names: dict[str, object], key: str, default: str) -> str:
    value = str(names.get(key, default))
    if value.count("%") != 1 or "%d" not in value:
        raise _refused(path, f"genai_config.json: {key}: expected a name with %d, got {value!r}")
    return value


def _number(path: Path, parent: dict[str, object], key: str) -> int:
    value = parent.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refused(path, f"genai_config.json: {key}: expected a whole number, got {value!r}")
    return value
