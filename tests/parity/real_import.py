"""`penstock models import` with the real builder, and the tokens of `transformers` after it.

Run by `make parity` alone: it needs torch, in the environment of `requirements.txt` beside this
file, and half a minute for each import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from workers.running.runner import Runner

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-parity/bin/python"
MODELS = Path(os.environ.get("PARITY_MODELS") or HERE / "models")
STEPS = 12


def penstock(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.cli", "models", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def imported(family: str, folder: Path, *words: str) -> Path:
    """The family's small random model, imported with these options."""
    source, output = folder / f"hf-{family}", folder / "-".join((family, *words)).replace("/", "")
    if not source.exists():
        subprocess.run([PYTHON, HERE / "checkpoint.py", family, source], check=True)
    end = ["-o", str(output), "--builder-python", str(PYTHON)]
    ended = penstock("import", str(source), *words, *end)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(output) and "laws hold" in ended.stderr
    return output


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_imported_model_has_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    folder = imported(family, tmp_path, "--precision", "fp32")
    runner = Runner(folder, slots=1, max_length=96, threads=1)
    with np.load(MODELS / f"expected_{family}.npz") as expected:
        for row, length in enumerate(expected["lengths"]):
            prompt = expected["prompts"][row][:length].tolist()
            logits, tokens = runner.prefill(0, prompt), list[int]()
            np.testing.assert_allclose(logits, expected["logits"][row][0], atol=1e-3)
            for step in range(STEPS):
                tokens.append(int(logits.argmax()))
                logits = np.array(runner.decode(tokens[-1:], [len(prompt) + step]))[0]
            assert tokens == expected["tokens"][row][:STEPS].tolist()
    runner.close()


@pytest.mark.parametrize(
    "words", [("int4",), ("int8",), ("w8a8",), ("int4", "--extra", "block_size=16")]
)
def test_quantized_models_keep_the_laws(words: tuple[str, ...], tmp_path: Path) -> None:
    folder = imported("qwen2", tmp_path, "--precision", *words)
    ended = penstock("check", str(folder), "--json")
    assert ended.returncode == 0, ended.stderr
    shown = json.loads(ended.stdout)
    assert all(law["holds"] and law["tried"] for law in shown["laws"])
    assert shown["features"]["weights"].startswith("int")


def test_a_model_for_cuda_is_made_where_there_is_none(tmp_path: Path) -> None:
    source, output = tmp_path / "hf", tmp_path / "cuda"
    subprocess.run([PYTHON, HERE / "checkpoint.py", "qwen2", source], check=True)
    words = ["--precision", "fp16", "--device", "cuda", "-o", str(output)]
    ended = penstock("import", str(source), *words, "--builder-python", str(PYTHON))
    assert ended.returncode == 0, ended.stderr
    assert list(output.glob("*.penstock-*.onnx"))
