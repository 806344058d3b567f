"""A model's folder of the optimum and transformers.js kind: which graph, and what config.json says.

Such a folder has `config.json`, `tokenizer.json` and one graph for each precision, in `onnx/` or
beside them; `penstock.json` names the one to use where there are several. Knows the files only:
whether a graph can run is said by prepare.py. docs/models.md.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from workers.folders.configs import number, read_object, refused
from workers.folders.files import write_whole

CHOICE = "penstock.json"
# How exporters call their precisions, and the import that makes its like.
_PRECISIONS = (
    ("q4f16", "int4", "cuda"),
    ("fp16", "fp16", "cuda"),
    ("q4", "int4", "cpu"),
    ("bnb4", "int4", "cpu"),
    ("int8", "int8", "cpu"),
    ("quantized", "int8", "cpu"),
)


@dataclass(frozen=True, slots=True)
class Export:
    """What config.json tells of the chosen graph; sizes in elements."""

    graph: Path
    context_length: int
    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def read(cls, path: Path) -> "Export":
        """Read the folder `path`; raises WorkerError `model` naming the file or key."""
        file = path / "config.json"
        config = read_object(file)
        pictures = next((key for key in ("vision_config", "audio_config") if key in config), None)
        if pictures:
            raise refused(path, f"config.json: {pictures}: not supported: more than text")
        heads = number(file, config, "num_attention_heads")
        kv_heads = "num_key_value_heads"
        return cls(
            graph=_chosen(path),
            context_length=number(file, config, "max_position_embeddings"),
            vocab_size=number(file, config, "vocab_size"),
            layers=number(file, config, "num_hidden_layers"),
            heads=heads,
            kv_heads=number(file, config, kv_heads) if config.get(kv_heads) else heads,
            head_size=number(file, config, "head_dim")
            if config.get("head_dim")
            else number(file, config, "hidden_size") // heads,
        )


def is_export(path: Path) -> bool:
    """Whether `path` is a folder of this kind (and none of the onnxruntime-genai builder's)."""
    whole = (path / "config.json").is_file() and not (path / "genai_config.json").is_file()
    return whole and bool(graphs(path))


def graphs(path: Path) -> dict[str, Path]:
    """The original graphs of the folder by name: `model_q4` is `onnx/model_q4.onnx`."""
    files = [*path.glob("onnx/*.onnx"), *path.glob("*.onnx")]
    return {file.stem: file for file in sorted(files) if ".penstock-" not in file.name}


def choose(path: Path, name: str) -> None:
    """Remember in `penstock.json` that the graph `name` is the folder's.

    Raises WorkerError `model` if there is none of that name, or the file cannot be written.
    """
    found = _found(path, name)
    file = path / CHOICE
    settings = read_object(file) if file.is_file() else {}
    settings["graph"] = found.relative_to(path).as_posix()
    try:
        write_whole(file, (json.dumps(settings, indent=2) + "\n").encode(), mode=0o644)
    except OSError as error:
        raise refused(path, f"{CHOICE} cannot be written: {error}") from error


def is_source(path: Path) -> bool:
    """Whether `path` is what models are imported from: a Hugging Face folder with weights."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def conversion(path: Path, graph: Path | None = None) -> str:
    """The command that makes a model of ours from what `path` was exported from, or is itself."""
    precision, device = _precision(graph.stem) if graph else ("int4", "cpu")
    source, told = _source(path)
    words = ["penstock", "models", "import", source, "--precision", precision, "--device", device]
    return f"convert it: {shlex.join([*words, '-o', f'{path}-{precision}'])}{told}"


def _source(path: Path) -> tuple[str, str]:
    """Where the weights are, as an argument, and what must be said of it."""
    if is_source(path):
        return str(path), ""
    file = path / "config.json"
    name = read_object(file).get("_name_or_path") if file.is_file() else None
    if isinstance(name, str) and name and not Path(name).is_absolute():
        return name, ""
    return "SOURCE", " (SOURCE: the Hugging Face folder or name that it was made from)"


def _precision(stem: str) -> tuple[str, str]:
    for sign, precision, device in _PRECISIONS:
        if sign in stem:
            return precision, device
    return "fp32", "cpu"


def _chosen(path: Path) -> Path:
    file = path / CHOICE
    name = read_object(file).get("graph") if file.is_file() else None
    if name is not None:
        return _found(path, str(name))
    found = graphs(path)
    if len(found) == 1:
        return next(iter(found.values()))
    command = shlex.join(["penstock", "models", "prepare", str(path), "--graph", "NAME"])
    raise refused(path, f"several graphs ({', '.join(found)}): choose one, once: {command}")


def _found(path: Path, name: str) -> Path:
    """By its stem, or by its path inside the folder."""
    found = graphs(path)
    for stem, file in found.items():
        if name in (stem, file.name, file.relative_to(path).as_posix()):
            return file
    raise refused(path, f"no graph {name!r}: expected one of {', '.join(found)}")
