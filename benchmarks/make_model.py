"""Makes a model of real size with random weights: a Hugging Face folder, ONNX from it, and GGUF.

Runs in the peers' environment (`make .venv-peers/installed`). What matters for speed is as in the
real model: shape, tied embeddings, vocabulary, precision. Two things are made up: a byte-level
tokenizer of invented merges, of the vocabulary's full size (sampling looks at the tokenizer's ids
only), and the last norm's weight, so that the logits are as peaked as those of a trained model.
One checkpoint is the source of all forms. Knows nothing of how fast anything runs.
"""

import argparse
import itertools
import json
import os
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from gguf_model import KINDS, quantize, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

MODELS = Path(__file__).parent / "models"
RECORD = "made.txt"
SEED = 20251123
CONTEXT = 4096
INITIALIZER = 0.02  # standard deviation of the weights, as both families are initialised
LOGIT_STD = 4.2  # entropy about ln(vocabulary) - LOGIT_STD**2 / 2: some 3 nats at 151,936 tokens
GGUF = "model.gguf"
SOURCES: dict[str, tuple[str, ...]] = {  # what each form is made from
    "hf": (),
    "fp32": ("hf",),
    "int8": ("hf",),
    "int4": ("hf",),
    "f32": ("hf",),
    "w8a8": ("hf", "fp32"),
    "q4_0": ("hf", "f32"),
    "q8_0": ("hf", "f32"),
}
FORMS = ("hf", "fp32", "int4", "w8a8", "f32", "q4_0", "q8_0")
PACKAGES = ("onnxruntime-genai", "onnxruntime", "torch", "transformers", "llama-cpp-python")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A published model's sizes; embeddings are tied in all of them."""

    config: type[PreTrainedConfig]
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rope_theta: float


SHAPES = {
    "qwen2.5-0.5b": Shape(Qwen2Config, 151_936, 896, 4_864, 24, 14, 2, 1_000_000.0),
    "smollm-135m": Shape(LlamaConfig, 49_152, 576, 1_536, 30, 9, 3, 10_000.0),
    # To try this script itself in seconds; far too small to measure anything with.
    "smoke": Shape(LlamaConfig, 2_048, 64, 128, 2, 4, 2, 10_000.0),
}


def merges(count: int) -> Iterator[tuple[str, str]]:
    """The first `count` merges of lower-case letters: pairs, then triples, then fours."""
    letters = string.ascii_lowercase
    pairs = [a + b for a, b in itertools.product(letters, repeat=2)]
    every = itertools.chain(
        itertools.product(letters, repeat=2),
        itertools.product(pairs, letters),
        itertools.product(pairs, repeat=2),
    )
    return itertools.islice(every, count)


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Bytes, merges and ChatML's markers: `vocab` tokens in all, the markers last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = list(merges(vocab - len(alphabet) - len(SPECIALS)))
    tokens = [*alphabet, *(left + right for left, right in merged)]
    bpe = models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merged)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    assert tokenizer.get_vocab_size() == vocab, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def configure(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return shape.config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=1e-6,
        initializer_range=INITIALIZER,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_checkpoint(shape: Shape, checkpoint: Path, seed: int, logit_std: float) -> None:
    """A Hugging Face folder: tokenizer, configuration, weights drawn from `seed`."""
    tokenizer = make_tokenizer(shape.vocab)
    torch.manual_seed(seed)
    config = configure(shape, tokenizer)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # A normalised row of length sqrt(hidden) times weights of INITIALIZER is one logit.
        model.model.norm.weight.fill_(logit_std / (INITIALIZER * shape.hidden**0.5))
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


def build(checkpoint: Path, folder: Path, scratch: Path, precision: str) -> None:
    """Export by onnxruntime-genai's model builder, for the CPU; its output only if it fails."""
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
            *("-i", str(checkpoint), "-o", str(folder), "-c", str(scratch)),
            *("-p", precision, "-e", "cpu"),
        ],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode:
        raise SystemExit(f"the model builder failed:\n{finished.stdout}")


def make(form: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Fill `folder` with one form of the model; those it is made from are there."""
    checkpoint = beside(folder, form, "hf")
    if form == "hf":
        shape = SHAPES[arguments.shape]
        write_checkpoint(shape, folder, arguments.seed, arguments.logit_std)
    elif form == "f32":
        write_gguf(checkpoint, folder / GGUF)
    elif form in KINDS:
        quantize(beside(folder, form, "f32") / GGUF, folder / GGUF, form, os.cpu_count() or 1)
    elif form == "w8a8":
        quantize_rows(beside(folder, form, "fp32"), folder)
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as cache:
            build(checkpoint, folder, Path(cache), form)


def quantize_rows(fp32: Path, folder: Path) -> None:
    """As `penstock models import --precision w8a8` does with what the builder made."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from workers.folders.row_quantized import quantize as quantize_graph

    quantize_graph(fp32 / "model.onnx", folder)
    for file in fp32.iterdir():
        if "onnx" not in file.name and file.name != RECORD:
            shutil.copyfile(file, folder / file.name)


def beside(folder: Path, form: str, other: str) -> Path:
    return folder.with_name(folder.name.removesuffix(form) + other)


def is_made(folder: Path, record: dict[str, object]) -> bool:
    """Whether it is there, of this shape and seed; SystemExit if it is somebody else's."""
    if not folder.exists():
        return False
    if not (folder / RECORD).is_file():
        raise SystemExit(f"{folder} is there and not of this script's making: it is left alone")
    made = json.loads((folder / RECORD).read_text())
    return all(made.get(name) == record[name] for name in ("shape", "seed", "logit_std"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--form", choices=SOURCES, nargs="+", default=FORMS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--logit-std", type=float, default=LOGIT_STD, help="untrained: 0.6")
    parser.add_argument("--output", type=Path, default=MODELS, help="gets folders SHAPE-FORM")
    arguments = parser.parse_args()
    record: dict[str, object] = {
        **{name: getattr(arguments, name) for name in ("shape", "seed", "logit_std")},
        "versions": {name: version(name) for name in PACKAGES},
    }
    wanted = set(arguments.form).union(*(SOURCES[form] for form in arguments.form))
    for form in [form for form in SOURCES if form in wanted]:  # sources come first
        folder = arguments.output / f"{arguments.shape}-{form}"
        if is_made(folder, record):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            make(form, folder, arguments)
        except BaseException:
            shutil.rmtree(folder)
            raise
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        print(f"made {folder}", flush=True)


if __name__ == "__main__":
    main()
