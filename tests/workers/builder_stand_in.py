"""A package in the place of onnxruntime-genai's builder, for an environment without torch.

Its builder does what the source folder tells it in `stand_in.json`: say lines, fail, wait until it
is ended, and copy the folder `built` (what a real builder made) to the output. So the tests of
importing run real programs in real environments, in a second; the real builder is run by
`make parity`.
"""

import json
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

LLAMA = Path(__file__).parents[1] / "parity/models/llama"
_BUILDER = """
import argparse, json, os, shutil, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
for short, long in (("-i", "--input"), ("-m", "--model"), ("-o", "--output"), ("-p", "--precision"),
                    ("-e", "--execution_provider"), ("-c", "--cache_dir")):
    parser.add_argument(short, long)
parser.add_argument("--extra_options", nargs="+", default=[])
given = parser.parse_args()
source = Path(given.input or os.environ["STAND_IN_SOURCE"])
told = json.loads((source / "stand_in.json").read_text())
output = Path(given.output)
output.mkdir(parents=True)
print("Reading layer 0")
(source / "given.json").write_text(json.dumps(sys.argv[1:] + [os.getcwd()]))
if told.get("wait"):
    (output / "model.onnx").write_text("half")
    (source / "waiting").write_text(str(os.getpid()))
    time.sleep(600)
if told.get("fail"):
    sys.exit("ValueError: " + told["fail"])
shutil.copytree(source / "built", output, dirs_exist_ok=True)
print(f"Saving ONNX model in {output}")
print("Saving weight:  10%|#   | 1/10 [00:00<00:00,  1.0it/s]")
"""
# Whatever workers/building/builder.py repairs is here to be repaired.
_BUILDERS = """
class Anything(type):
    def __getattr__(cls, name):
        return lambda *given, **named: None

def __getattr__(name):
    return Anything(name, (), {})
"""
FILES = {
    "onnxruntime_genai/__init__.py": "",
    "onnxruntime_genai/models/__init__.py": (
        "import os, sys\nsys.path.append(os.path.dirname(__file__))\n"
    ),
    "onnxruntime_genai/models/builder.py": _BUILDER,
    "builders.py": _BUILDERS,
}
_INFO = "onnxruntime_genai-0.0.1.dist-info"


def wheel(folder: Path) -> Path:
    """The package as a wheel in `folder`."""
    path = folder / "onnxruntime_genai-0.0.1-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: onnxruntime-genai\nVersion: 0.0.1\n"
    kind = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = FILES | {f"{_INFO}/METADATA": metadata, f"{_INFO}/WHEEL": kind}
    record = "".join(f"{name},,\n" for name in [*files, f"{_INFO}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {f"{_INFO}/RECORD": record}).items():
            archive.writestr(name, text)
    return path


def environment(folder: Path) -> Path:
    """The Python of an environment that has the package, and ours behind it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    for name, text in FILES.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 296,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def source(folder: Path, **told: Any) -> Path:
    """A Hugging Face folder of which the stand-in makes the Llama of tests/parity/models."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((LLAMA / name).read_bytes())
    write(folder / "config.json", CONFIG)
    write(folder / "generation_config.json", {"eos_token_id": [295]})
    write(folder / "stand_in.json", told)
    weights(folder / "model.safetensors", elements=32)
    built = folder / "built"
    built.mkdir()
    for file in LLAMA.iterdir():
        if ".penstock-" not in file.name:
            (built / file.name).write_bytes(file.read_bytes())
    return folder


def weights(file: Path, elements: int) -> None:
    """A safetensors file of one tensor of so many fp32 zeros."""
    tensor = {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * elements))


def write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))
