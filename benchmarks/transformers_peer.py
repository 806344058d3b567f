"""Hugging Face transformers as a peer: `generate` on static batches, and its continuous batching.

Runs in the peers' environment, on the CPU. The continuous form shares the blocks of a common prefix
among requests, as it does by itself.
"""

import argparse
import logging
from collections.abc import Mapping
from functools import partial

import torch
from peer_side import Mode, Stamps, Work, serve
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig, StoppingCriteria

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAGE = 32
PASS = 512  # tokens of one pass at most


def load(folder: str, threads: int, dtype: str) -> Mapping[str, Mode]:
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    model.eval()
    # Without an end no token needs to be forbidden, which costs it a pass over the vocabulary.
    model.generation_config.eos_token_id = None
    return {"static": partial(static, model), "continuous": partial(continuous, model)}


class Noted(StoppingCriteria):
    """Never stops; is asked once a step."""

    def __init__(self, limits: list[int], stamps: Stamps) -> None:
        self.limits, self.stamps, self.steps = limits, stamps, 0

    def __call__(self, ids: torch.LongTensor, scores: object, **_: object) -> torch.Tensor:
        self.stamps(sum(limit > self.steps for limit in self.limits))
        self.steps += 1
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def static(model: PreTrainedModel, work: Work, stamps: Stamps) -> list[list[int]]:
    """Batches of `work.rows` prompts of one length; each runs until its longest row is done."""
    tokens: list[list[int]] = []
    for first in range(0, len(work.prompts), work.rows):
        chosen = slice(first, first + work.rows)
        limits, ids = work.limits[chosen], torch.tensor(work.prompts[chosen])
        asked = GenerationConfig(max_new_tokens=max(limits), do_sample=False)
        criteria = [Noted(limits, stamps)]
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=asked,
                stopping_criteria=criteria,
            )
        rows = found[:, ids.shape[1] :].tolist()
        tokens += [row[:limit] for row, limit in zip(rows, limits, strict=True)]
    return tokens


def continuous(model: PreTrainedModel, work: Work, stamps: Stamps) -> list[list[int]]:
    """Requests come and go as they please, `work.rows` at once at most; no token ends one."""
    longest = max(len(p) + n for p, n in zip(work.prompts, work.limits, strict=True))
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=(work.rows + 1) * (longest // PAGE + 2),
        max_batch_tokens=PASS,
        max_requests_per_batch=work.rows,
    )
    asked = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(work.limits))
    context = model.continuous_batching_context_manager(
        generation_config=asked, continuous_batching_config=config, warmup=False
    )
    found: dict[str, list[int]] = {}
    with context as manager:
        for number, (prompt, limit) in enumerate(zip(work.prompts, work.limits, strict=True)):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=limit)
        while len(found) < len(work.prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                found[result.request_id] = list(result.generated_tokens)
                stamps(len(result.generated_tokens))
            assert result is not None or manager.is_running(), "transformers has given up"
    return [found[str(number)] for number in range(len(work.prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    options = parser.parse_args()
    serve(("transformers", "torch"), lambda: load(options.folder, options.threads, options.dtype))


if __name__ == "__main__":
    main()
