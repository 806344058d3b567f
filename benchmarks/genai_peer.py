"""onnxruntime-genai as a peer: its generator on static batches, and its `Engine`.

Runs in the peers' environment, since onnxruntime-genai depends on `onnxruntime`, which owns the
same module as `onnxruntime-gpu`. On the CPU the `Engine` batches statically too: its continuous
form needs PagedAttention, which has no kernel there.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import onnxruntime_genai as og
from peer_side import Mode, Stamps, Work, serve

Batch = Callable[[Sequence[Sequence[int]], Sequence[int], Stamps], list[list[int]]]


def load(folder: str, threads: int, rows: int) -> Mapping[str, Mode]:
    """The model on the CPU with so many threads."""
    options = {"intra_op_num_threads": threads}
    config = og.Config(folder)
    decoder = {"session_options": options}
    static = {"static_batching": {"max_batch_size": rows}}
    config.overlay(json.dumps({"model": {"decoder": decoder}, "engine": static}))
    model = og.Model(config)
    engine = og.Engine(model)
    return {
        "static": in_batches(partial(generator_batch, model)),
        "engine": in_batches(partial(engine_batch, engine)),
    }


def in_batches(run: Batch) -> Mode:
    """Batches of `work.rows` prompts in their order; each runs until its longest row is done."""

    def mode(work: Work, stamps: Stamps) -> list[list[int]]:
        tokens: list[list[int]] = []
        for first in range(0, len(work.prompts), work.rows):
            chosen = slice(first, first + work.rows)
            tokens += run(work.prompts[chosen], work.limits[chosen], stamps)
        return tokens

    return mode


def generator_batch(
    model: og.Model, prompts: Sequence[Sequence[int]], limits: Sequence[int], stamps: Stamps
) -> list[list[int]]:
    """Prompts are of one length, so that none is padded. Rows beyond their limit are not counted.

    `min_length` = `max_length` keeps the generator from ending at an EOS token.
    """
    start = len(prompts[0])
    length = start + max(limits)
    params = og.GeneratorParams(model)
    params.set_search_options(
        batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
    )
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray(prompts, dtype=np.int32))
    done = 0
    while not generator.is_done():
        generator.generate_next_token()
        stamps(sum(limit > done for limit in limits))
        done += 1
    rows = [generator.get_sequence(row)[start:].tolist() for row in range(len(prompts))]
    return [row[:limit] for row, limit in zip(rows, limits, strict=True)]


def engine_batch(
    engine: og.Engine, prompts: Sequence[Sequence[int]], limits: Sequence[int], stamps: Stamps
) -> list[list[int]]:
    """The same as so many requests of its `Engine`, begun together."""
    buffer = engine.create_event_buffer(4 * len(prompts))
    found: dict[og.Request, list[int]] = {}
    for prompt, limit in zip(prompts, limits, strict=True):
        options = og.RequestOptions()
        options.set_max_session_tokens(len(prompt) + limit)
        request = engine.create_request(options=options)
        turn = og.TurnOptions(request)
        turn.set_do_sample(False)
        turn.set_min_generated_tokens(limit)
        turn.set_max_generated_tokens(limit)
        request.begin_turn(np.asarray(prompt, dtype=np.int32), turn)
        found[request] = []
    while engine.has_pending_requests():
        events = [e for e in engine.run(buffer) if e.flags.value & og.EngineEventFlags.TOKEN.value]
        for event in events:
            found[event.request].append(event.token)
        stamps(len(events))
    for request in found:
        request.close()
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="at most in one batch")
    arguments = parser.parse_args()
    packages = ("onnxruntime-genai", "onnxruntime")
    serve(packages, lambda: load(arguments.folder, arguments.threads, arguments.rows))


if __name__ == "__main__":
    main()
