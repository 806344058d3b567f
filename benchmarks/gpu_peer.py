"""Hugging Face transformers on a GPU as a peer: `generate` on static batches, random weights.

The model is made where it runs, of a shape alone: speed does not depend on the numbers. Runs in an
environment with a torch that has the device. Knows nothing of Penstock.
"""

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from peer_side import Mode, Stamps, Work, serve
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import StoppingCriteria

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(shape: Path, device: str) -> Mapping[str, Mode]:
    sizes = json.loads(shape.read_text())
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_size"],
        max_position_embeddings=sizes["context"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
    )
    torch.set_default_dtype(DTYPES[sizes["precision"]])
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.eval()
    model.generation_config.eos_token_id = None
    return {"static": partial(static, model)}


class Noted(StoppingCriteria):
    """Never stops; is asked once a step, and waits until the device has made it."""

    def __init__(self, limits: list[int], stamps: Stamps) -> None:
        self.limits, self.stamps, self.steps = limits, stamps, 0

    def __call__(self, ids: torch.LongTensor, scores: object, **_: object) -> torch.Tensor:
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        self.stamps(sum(limit > self.steps for limit in self.limits))
        self.steps += 1
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def static(model: LlamaForCausalLM, work: Work, stamps: Stamps) -> list[list[int]]:
    """Batches of `work.rows` prompts of one length; each runs until its longest row is done."""
    tokens: list[list[int]] = []
    for first in range(0, len(work.prompts), work.rows):
        chosen = slice(first, first + work.rows)
        limits = work.limits[chosen]
        ids = torch.tensor(work.prompts[chosen], device=model.device)
        asked = GenerationConfig(max_new_tokens=max(limits), do_sample=False)
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=asked,
                stopping_criteria=[Noted(limits, stamps)],
            )
        rows = found[:, ids.shape[1] :].tolist()
        tokens += [row[:limit] for row, limit in zip(rows, limits, strict=True)]
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", type=Path)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    serve(("transformers", "torch"), lambda: load(options.shape, options.device))


if __name__ == "__main__":
    main()
