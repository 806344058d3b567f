"""Turns the trained Hugging Face folder into the ONNX folder, checks it and scores it.

    python -m workers.models.tiny.export --hf build/tiny/hf --output workers/models/tiny

The conversion is onnxruntime-genai's model builder (fp32, CPU), so the folder has the layout and
the graph of any other model it makes. The builder's package depends on `onnxruntime`, which must
not be installed beside `onnxruntime-gpu`: `--builder-python` names another environment's Python.
Knows nothing of training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from workers.models.tiny import tasks, vocabulary
from workers.models.tiny.samples import Sample

FILES = (
    "model.onnx",
    "model.onnx.data",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
CHECKED_PROMPTS = 200
SCORED_PROMPTS = 500
NEW_TOKENS = 160


@dataclass(frozen=True)
class Check:
    """Exported graph against PyTorch."""

    prompts: int
    same_tokens: int
    steps: int
    largest_difference: float

    def passed(self) -> bool:
        return self.same_tokens == self.prompts and self.largest_difference < 1e-3


class Exported:
    """The exported folder, run greedily one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = str(folder / "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), "f4")
        self.layers = decoder["num_hidden_layers"]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def greedy(self, prompt: list[int], limit: int) -> tuple[list[int], list[np.ndarray]]:
        """New tokens, end token included, and the logits [V] each was chosen from."""
        parts = [f"{i}.{part}" for i in range(self.layers) for part in ("key", "value")]
        past = {f"past_key_values.{p}": self.empty for p in parts}
        ids, seen = prompt, 0
        tokens: list[int] = []
        logits: list[np.ndarray] = []
        while len(tokens) < limit:
            seen += len(ids)
            feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, seen), np.int64)}
            result = dict(zip(self.outputs, self.session.run(None, feed | past), strict=True))
            logits.append(result["logits"][0, -1])
            ids = [int(logits[-1].argmax())]
            tokens += ids
            past = {f"past_key_values.{p}": result[f"present.{p}"] for p in parts}
            if ids[0] in self.ends:
                break
        return tokens, logits


def build(source: Path, output: Path, python: str) -> None:
    """Runs the model builder and moves its files into `output`, each one atomically."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
        command += ["-o", str(made), "-p", "fp32", "-e", "cpu", "-c", str(Path(scratch) / "cache")]
        subprocess.run(command, check=True)  # noqa: S603
        for name in FILES:
            made_or_given = source if (source / name).exists() else made  # as trained, not re-saved
            if (made_or_given / name).exists():
                part = output / f"{name}.part"
                shutil.copy(made_or_given / name, part)
                os.replace(part, output / name)


@torch.no_grad()
def check(source: Path, output: Path) -> Check:
    """Greedy decoding of held-out prompts by both; PyTorch without a cache, from the whole text."""
    reference = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    exported = Exported(output)
    tokenizer, chat = Tokenizer.from_file(str(output / "tokenizer.json")), vocabulary.template()
    number = -(-CHECKED_PROMPTS // len(tasks.EVALUATED))
    samples = [s for task in tasks.EVALUATED for s in tasks.evaluation(task, number, seed=1)]
    same = steps = 0
    largest = 0.0
    for sample in samples[:CHECKED_PROMPTS]:
        prompt = tokenizer.encode(vocabulary.render(chat, sample)[0], add_special_tokens=False).ids
        tokens, logits = exported.greedy(prompt, NEW_TOKENS)
        whole = torch.tensor([prompt + tokens[:-1]])
        expected = reference(whole).logits[0, len(prompt) - 1 :].numpy()
        same += expected.argmax(-1).tolist() == tokens
        steps += len(tokens)
        largest = max(largest, float(np.abs(expected - np.stack(logits)).max()))
    return Check(min(len(samples), CHECKED_PROMPTS), same, steps, largest)


def evaluation_prompts(number: int = SCORED_PROMPTS) -> list[tuple[str, Sample]]:
    """The rendered prompts that are scored, with their samples."""
    chat = vocabulary.template()
    samples = [s for task in tasks.EVALUATED for s in tasks.evaluation(task, number, seed=2)]
    return [(vocabulary.render(chat, s)[0], s) for s in samples]


def evaluate(output: Path, number: int = SCORED_PROMPTS) -> dict[str, tuple[int, int]]:
    """Task to (right, asked) over held-out prompts: greedy decoding by the exported graph."""
    exported = Exported(output)
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    scores = dict.fromkeys(tasks.EVALUATED, (0, 0))
    for text, sample in evaluation_prompts(number):
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        tokens, _ = exported.greedy(prompt, NEW_TOKENS)
        ended = tokens[-1] in exported.ends
        right, asked = scores[sample.task]
        hit = ended and sample.correct(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
        scores[sample.task] = (right + hit, asked + 1)
    return scores


def export(source: Path, output: Path, python: str) -> tuple[Check, dict[str, tuple[int, int]]]:
    """Builds, checks, scores, and prints the figures; raises if the check fails."""
    build(source, output, python)
    result = check(source, output)
    print(
        f"check: {result.same_tokens} of {result.prompts} prompts with the same greedy tokens, "
        f"{result.steps} steps, largest logit difference {result.largest_difference:.2e}"
    )
    if not result.passed():
        raise SystemExit("the exported graph and PyTorch differ")
    scores = evaluate(output)
    for task, (right, asked) in scores.items():
        print(f"{task:<12} {right}/{asked} {100 * right / asked:.1f} %")
    return result, scores


def main(arguments: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=vocabulary.HERE)
    parser.add_argument("--builder-python", default=sys.executable)
    options = parser.parse_args(arguments)
    return export(options.hf, options.output, options.builder_python)


if __name__ == "__main__":
    main()
