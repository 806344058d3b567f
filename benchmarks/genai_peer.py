"""onnxruntime-genai's own generator as a peer: generates static batches when told to, and times it.

Runs in the parity environment (tests/parity/requirements.txt), since onnxruntime-genai depends on
`onnxruntime`, which owns the same module as `onnxruntime-gpu`. One JSON object a line: commands on
stdin, answers on stdout. Knows nothing of Penstock: a folder and token ids in, token ids out.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import TextIO

import numpy as np
import onnxruntime_genai as og


def load(folder: str, threads: int) -> og.Model:
    """The model on the CPU with so many threads."""
    options = {"intra_op_num_threads": threads}
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def generate(model: og.Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations of one static batch; `prompts` are of one length, so none is padded.

    `min_length` = `max_length` keeps the generator from ending at an EOS token.
    """
    length = len(prompts[0]) + new_tokens
    params = og.GeneratorParams(model)
    params.set_search_options(
        batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
    )
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray(prompts, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    start = len(prompts[0])
    return [generator.get_sequence(row)[start:].tolist() for row in range(len(prompts))]


def answer(model: og.Model, command: dict[str, object]) -> dict[str, object]:
    """Do one command: all prompts in batches; seconds by the clock and of the processor."""
    prompts, batch = command["prompts"], command["batch"]
    assert isinstance(prompts, list) and isinstance(batch, int)
    began, cpu_began = time.perf_counter(), time.process_time()
    tokens: list[list[int]] = []
    for first in range(0, len(prompts), batch):
        tokens += generate(model, prompts[first : first + batch], int(str(command["new_tokens"])))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}


def serve(model: og.Model, commands: TextIO, answers: TextIO) -> None:
    """Answer until the commands end; the first line says that the model is loaded."""
    versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in commands:
        print(json.dumps(answer(model, json.loads(line))), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    # What the library may print to stdout must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(load(arguments.folder, arguments.threads), sys.stdin, answers)


if __name__ == "__main__":
    main()
