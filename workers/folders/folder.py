"""A model's folder: what its files say, whoever made it.

The onnxruntime-genai builder's (`genai_config.json`) is read here, an export of the optimum kind by
exports.py. Knows nothing of onnxruntime: it reads JSON, finds folders by name, and refuses what is
not whole.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import NotFound, WorkerError
from workers.folders.configs import number, read_object, refused, section
from workers.folders.exports import Export, conversion, is_export, is_source

TINY = Path(__file__).parents[1] / "models" / "tiny"


def file_digest(file: Path) -> bytes:
    """SHA-256 of a whole file, read now."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a runner needs to know of a model before it is loaded; sizes in elements."""

    name: str
    path: Path
    graph: Path
    context_length: int
    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    past_key: str
    past_value: str
    present_key: str
    present_value: str

    @classmethod
    def load(cls, path: Path, name: str | None = None) -> "ModelFolder":
        """Read the folder's files; raises WorkerError naming the file or key that is wrong."""
        path = path.resolve()
        exported, file = is_export(path), path / "genai_config.json"
        for required in ("config.json" if exported else file.name, "tokenizer.json"):
            if not (path / required).is_file():
                how = f"; {conversion(path)}" if is_source(path) else ""
                raise refused(path, f"{required} is missing: not a model's folder{how}")
        name = name or path.name
        if exported:
            names: dict[str, Any] = dict(_NAMES)
            return cls(name=name, path=path, **asdict(Export.read(path)), **names)
        model = section(file, read_object(file), "model")
        decoder = section(file, model, "decoder")
        inputs, outputs = section(file, decoder, "inputs"), section(file, decoder, "outputs")
        return cls(
            name=name,
            path=path,
            graph=_graph(path, decoder),
            context_length=number(file, model, "context_length"),
            vocab_size=number(file, model, "vocab_size"),
            layers=number(file, decoder, "num_hidden_layers"),
            heads=number(file, decoder, "num_attention_heads"),
            kv_heads=number(file, decoder, "num_key_value_heads"),
            head_size=number(file, decoder, "head_size"),
            past_key=_pattern(file, inputs, "past_key"),
            past_value=_pattern(file, inputs, "past_value"),
            present_key=_pattern(file, outputs, "present_key"),
            present_value=_pattern(file, outputs, "present_value"),
        )

    def digest(self, of: Callable[[Path], bytes] = file_digest) -> str:
        """SHA-256 over every file that decides a logit or a token: weights, tokenizer, template.

        `of` gives the SHA-256 of one file (digests.py remembers those of large ones).
        """
        whole = hashlib.sha256()
        exported = is_export(self.path)
        for file in sorted({*self.path.iterdir(), *self.graph.parent.iterdir()}):
            # An export's other precisions are other models.
            ours = file.name.startswith(self.graph.name) if exported else True
            if file.is_file() and _counts(file) and (ours or ".onnx" not in file.name):
                whole.update(file.name.encode() + b"\0")
                whole.update(of(file))
        return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class BrokenFolder:
    """A folder that a builder or an exporter began, and why it is no model."""

    name: str
    path: Path
    error: str


def find_model(name: str, models_dir: Path) -> ModelFolder:
    """The folder of `tiny`, of a name under `models_dir`, or of a path; NotFound otherwise."""
    if name == "tiny":
        return ModelFolder.load(TINY, "tiny")
    for path in (models_dir / name, Path(name)):
        if _is_model(path):
            return ModelFolder.load(path)
    if Path(name).is_dir():
        return ModelFolder.load(Path(name))
    raise NotFound("model", name)


def list_models(models_dir: Path) -> list[ModelFolder | BrokenFolder]:
    """The embedded model and every folder of `models_dir` that holds one, by name."""
    found: list[ModelFolder | BrokenFolder] = [ModelFolder.load(TINY, "tiny")]
    if models_dir.is_dir():
        hidden = "."  # an import that is not finished
        folders = sorted(models_dir.iterdir())
        folders = [each for each in folders if _is_model(each) and each.name[:1] != hidden]
        found += [_load_or_tell(folder) for folder in folders]
    return found


def _is_model(path: Path) -> bool:
    return (path / "genai_config.json").is_file() or is_export(path)


def _load_or_tell(folder: Path) -> ModelFolder | BrokenFolder:
    try:
        return ModelFolder.load(folder)
    except WorkerError as error:
        return BrokenFolder(folder.name, folder.resolve(), error.message)


_NAMES = {
    "past_key": "past_key_values.%d.key",
    "past_value": "past_key_values.%d.value",
    "present_key": "present.%d.key",
    "present_value": "present.%d.value",
}


def _counts(file: Path) -> bool:
    prepared = ".penstock-" in file.name
    return not prepared and (".onnx" in file.name or file.suffix in {".json", ".jinja"})


def _graph(path: Path, decoder: dict[str, object]) -> Path:
    filename = str(decoder.get("filename", "model.onnx"))
    graph = path / filename
    if "\0" in filename or graph.resolve().parent != path or not graph.is_file():
        raise refused(path, f"decoder.filename {filename!r} is not a file of the folder")
    return graph


def _pattern(file: Path, names: dict[str, object], end: str) -> str:
    key = f"{end}_names"
    value = str(names.get(key, _NAMES[end]))
    if value.count("%") != 1 or "%d" not in value:
        raise refused(file.parent, f"{file.name}: {key}: expected a name with %d, got {value!r}")
    return value
