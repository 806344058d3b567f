"""Makes the models and the expected values that the parity test compares the runner with.

For each family (families.py): a model of a few hundred kilobytes with random weights drawn from a
seed, exported by onnxruntime-genai's model builder as `penstock models import` runs it (fp32, CPU;
for some int4, int8 and fp16 too), and what `transformers` says about it: 24 greedy tokens, the
logits of some of them, log-probabilities and 20 most probable tokens for eight prompts of different
lengths, each generated alone and without padding.

Runs in an environment of its own (`requirements.txt` beside this file), because
onnxruntime-genai pulls in `onnxruntime`, which owns the same module as `onnxruntime-gpu`. It
imports nothing of Penstock and edits no graph. The test in `tests/workers/test_parity.py` compares.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from families import CONTEXT, FAMILIES, configure
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SEED = 20250117
PROMPT_LENGTHS = (1, 2, 3, 7, 12, 19, 31, 40)
NEW_TOKENS = 24
TOP_LOGPROBS = 20
LOGIT_STEPS = (0, 1, 2, 5, 9, 14, 19, 23)  # enough, and a third of the bytes
LEAST_MARGIN = 0.02  # between the two best logits: 20 times the comparison's tolerance
TRIES = 200
BUILDER = Path(__file__).parents[2] / "workers" / "building" / "builder.py"
PACKAGES = ("torch", "transformers", "onnxruntime-genai", "onnx", "tokenizers", "numpy")

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    "Ġ t,h e,Ġ a,i n,r e,o n,Ġt he,e r,Ġ s,Ġ o,a t,n d,o r,Ġ w,i s,e n,e s,Ġ c,i t,o u,a n,"
    "a l,in g,Ġa nd,u s,us er,s t,s y,sy st,syst e,syste m,a s,as s,is t,ass ist,an t,assist ant"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, a few merges, and ChatML's markers behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, right in (pair.split() for pair in MERGES.split(","))]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Replaces every parameter, in the order of their names.

    Wide enough that the logits are far from flat and depend on the whole context: norms around
    1, biases and the rest with the standard deviations below. NumPy's generator, so that a new
    torch or transformers draws the same ones.
    """
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = random.standard_normal(tuple(parameter.shape), dtype=np.float32)
            if "norm" in name:
                drawn = 1 + 0.2 * drawn
            elif name.startswith(("lm_head", "model.embed")):
                drawn *= 0.5
            else:
                drawn *= 0.3
            parameter.copy_(torch.from_numpy(drawn))


def generate(model: PreTrainedModel, prompt: list[int]) -> dict[str, NDArray[np.generic]]:
    """Greedy `tokens` [NEW_TOKENS], the `logits` [NEW_TOKENS, V] they were chosen from, and what
    `transformers` and torch make of these: each token's `logprobs` [NEW_TOKENS], the ids `top`
    and `top_logprobs` [NEW_TOKENS, TOP_LOGPROBS] of the most probable.

    Phi's `generate` computes everything anew with the long factors when a text grows beyond the
    original context, so that a step's logits are those of the whole text up to there.
    """
    ids = torch.tensor([prompt])
    result = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(result.logits)
    scores = model.compute_transition_scores(result.sequences, result.logits, normalize_logits=True)
    top = torch.log_softmax(logits, dim=-1).topk(TOP_LOGPROBS, dim=-1)
    return {
        "tokens": result.sequences[0, len(prompt) :].numpy(),
        "logits": logits.numpy().astype(np.float32),
        "logprobs": scores[0].numpy(),
        "top": top.indices.numpy(),
        "top_logprobs": top.values.numpy(),
    }


def unambiguous(logits: NDArray[np.float32]) -> bool:
    best = np.partition(logits, -2, axis=-1)[:, -2:]
    return bool((best[:, 1] - best[:, 0]).min() >= LEAST_MARGIN)


def expect(model: PreTrainedModel, seed: int) -> dict[str, NDArray[np.generic]]:
    """Prompts drawn again until no greedy choice is close; padded with 0 in the archive."""
    random = np.random.default_rng(seed)
    prompts = np.zeros((len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)), np.int64)
    found = []
    for row, length in enumerate(PROMPT_LENGTHS):
        for _ in range(TRIES):
            prompt = random.integers(0, model.config.vocab_size, length)
            generated = generate(model, prompt.tolist())
            if unambiguous(generated["logits"]):
                break
        else:
            raise RuntimeError(f"no unambiguous prompt of {length} tokens in {TRIES} tries")
        prompts[row, :length] = prompt
        found.append(generated | {"logits": generated["logits"][list(LOGIT_STEPS)]})
    return {
        "prompts": prompts,
        "lengths": np.array(PROMPT_LENGTHS, np.int32),
        "logit_steps": np.array(LOGIT_STEPS, np.int32),
        **{name: np.stack([each[name] for each in found]) for name in found[0]},
    }


def build(checkpoint: Path, folder: Path, scratch: Path, kind: str) -> None:
    """Exports a Hugging Face folder; fp16 in the form for CUDA, the others for the CPU."""
    precision, _, part = kind.partition("-")
    finished = subprocess.run(
        [
            *(sys.executable, str(BUILDER)),
            *("-i", str(checkpoint), "-o", str(folder), "-c", str(scratch)),
            *("-p", precision, "-e", "cuda" if precision == "fp16" else "cpu"),
        ],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode:
        raise RuntimeError(f"the model builder failed:\n{finished.stdout}")
    if part == "graph":
        (folder / "model.onnx.data").unlink()


def make(name: str, output: Path, seed: int) -> None:
    """Writes `output/name/` (the exported folder), its other builds, and `expected_name.npz`."""
    family, tokenizer = FAMILIES[name], byte_tokenizer()
    model = AutoModelForCausalLM.from_config(
        configure(family, tokenizer), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    draw_weights(model, seed)
    np.savez_compressed(output / f"expected_{name}.npz", **expect(model, seed + 1))
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        for kind in ("fp32", *family.builds):
            folder = output / (name if kind == "fp32" else f"{name}-{kind}")
            shutil.rmtree(folder, ignore_errors=True)
            build(checkpoint, folder, Path(scratch) / "cache", kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in arguments.family or FAMILIES:
        make(name, arguments.output, arguments.seed)
        print(f"made {arguments.output / name}")
    record = {"seed": arguments.seed, "versions": {name: version(name) for name in PACKAGES}}
    (arguments.output / "made.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
