"""transformers' own logits processors as a peer: samples given logits when told to, and times it.

Runs in the parity environment (tests/parity/requirements.txt). One JSON object a line: commands on
stdin, answers on stdout. What `generate` does in a step after the forward pass: processors, then
softmax and multinomial, or argmax. Where it has no processor for what Penstock does (frequency and
presence penalties, a grammar's mask) the nearest there is stands in. Knows nothing of Penstock.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TextIO

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopPLogitsWarper,
)

SO_FAR = 200  # tokens of the text that the penalty looks at
TOP = 20

Step = Callable[[torch.Tensor], object]


def drawn(scores: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)


def step_of(kind: str, logits: torch.Tensor, mask: torch.Tensor | None) -> Step:
    """What is done with a batch's logits, float32 [batch, vocabulary]."""
    ids = torch.randint(logits.shape[1], (logits.shape[0], SO_FAR))
    if kind == "greedy":
        return lambda x: torch.argmax(x, dim=-1)
    if kind == "top_p 0.95":
        warpers = LogitsProcessorList([TopPLogitsWarper(0.95)])
        return lambda x: drawn(warpers(ids, x))
    bias = SequenceBiasLogitsProcessor([[[5], 1.0], [[7], -100.0]])
    both = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1), bias])
    if kind == "penalised":
        return lambda x: drawn(both(ids, x))
    if kind == "all of these":
        three = LogitsProcessorList([*both, TopPLogitsWarper(0.95)])
        return lambda x: with_logprobs(x, drawn(three(ids, x)))
    if kind == "logprobs 20":
        return lambda x: with_logprobs(x, drawn(x))
    if kind == "JSON":
        assert mask is not None
        return lambda x: drawn(x.masked_fill(mask, -torch.inf))
    assert kind == "plain", kind
    return drawn


def with_logprobs(x: torch.Tensor, tokens: torch.Tensor) -> object:
    logprobs = torch.log_softmax(x, dim=-1)
    return logprobs.gather(1, tokens[:, None]), torch.topk(logprobs, TOP, dim=-1)


def answer(command: dict[str, object]) -> dict[str, object]:
    """Seconds of each of `steps` steps on the logits in a file; a masked token's bit is set."""
    logits = torch.from_numpy(np.load(str(command["logits"])))
    stored = command.get("mask")
    mask = torch.from_numpy(np.load(str(stored))) if stored else None
    step = step_of(str(command["kind"]), logits, mask)
    step(logits)
    seconds = []
    for _ in range(int(str(command["steps"]))):
        began = time.perf_counter()
        step(logits)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds}


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer until the commands end; the first line says what is there."""
    versions = {name: version(name) for name in ("transformers", "torch")}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in commands:
        with torch.inference_mode():
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    # What the library may print to stdout must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
