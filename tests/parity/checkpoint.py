"""Writes a family's small random model as the Hugging Face folder that make.py exports from.

The same seed, and so the same weights as `expected_FAMILY.npz`. Runs in the environment of
`requirements.txt`: python tests/parity/checkpoint.py FAMILY OUTPUT
"""

from __future__ import annotations

import sys

import torch
from families import FAMILIES, configure
from make import SEED, byte_tokenizer, draw_weights
from transformers import AutoModelForCausalLM


def main() -> None:
    name, output = sys.argv[1:]
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_config(
        configure(FAMILIES[name], tokenizer), dtype=torch.float32
    ).eval()
    draw_weights(model, SEED)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
