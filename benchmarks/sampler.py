"""Milliseconds a step of the sampler, beside transformers' processors and a full sort in numpy.

For vocabularies of 32,000 and 152,000, batches of 1, 8 and 32, and rows of seven kinds; a second
table says how much of a JSON row's time is the grammar's, and a third what share of a decode step
of a 0.5B model the sampler takes, step by step on its own logits, with one thread and with
--threads. In the first ours is one thread; the peer has all it is given, and its masks are made
beforehand. All take turns, ratios are made within rounds. What is sampled, and how, stands in
sampling.py; the peer in hf_peer.py.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from peers import PeerProcess
from sampling import KINDS, Batch, full_sort, make_grammar, make_logits
from stopwatch import busy_share

from orchestrator.terminal import print_table
from workers.drawing.sampler import HostSampler
from workers.grammars.constraint import Grammar
from workers.running.runner import Runner

HERE = Path(__file__).parent
MODEL = HERE / "models" / "qwen2.5-0.5b-int4"
PEER = HERE / "hf_peer.py"
PEER_PYTHON = HERE.parent / ".venv-parity" / "bin" / "python"
VOCABULARIES = (32_000, 152_000)
BATCHES = (1, 8, 32)
FLAT_BATCH = 8
STEPS = 5  # of a turn
CONTEXT = 64  # tokens before a decode step
SEED = 7
OURS, HF, NAIVE = "ours", "HF", "full sort"


class Peer(PeerProcess):
    """transformers in a process of its own."""

    def __init__(self, python: Path, threads: int) -> None:
        super().__init__(python, PEER, "--threads", str(threads))

    def steps(self, kind: str, logits: Path, mask: Path | None) -> list[float]:
        """Seconds of STEPS steps."""
        command = {"kind": kind, "logits": str(logits), "steps": STEPS}
        reply = self.ask(command | ({"mask": str(mask)} if mask else {}))
        return [float(each) for each in reply["seconds"]]


# --- turns ----------------------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def our_steps(batch: Batch, logits: np.ndarray, steps: int) -> list[tuple[float, float]]:
    """(seconds in the grammar, seconds in the sampler) of each step."""
    found = []
    for _ in range(steps):
        grammar = timed(batch.mask)
        began = time.perf_counter()
        tokens = batch.sample(logits)
        sampler = time.perf_counter() - began
        grammar += timed(lambda tokens=tokens: batch.advance(tokens))
        found.append((grammar, sampler))
    return found


def measure(
    batch: Batch, logits: np.ndarray, peer: Peer | None, rounds: int, work: Path
) -> list[dict[str, float]]:
    """Median seconds a step of every system, round after round."""
    our_steps(batch, logits, 2)
    file, mask = work / "logits.npy", None
    np.save(file, logits)
    if batch.matchers:
        mask = work / "mask.npy"
        np.save(mask, batch.forbidden())
    found = []
    for _ in range(rounds):
        ours = our_steps(batch, logits, STEPS)
        turn = {OURS: statistics.median(sum(each) for each in ours)}
        turn["grammar"] = statistics.median(grammar for grammar, _ in ours)
        if peer:
            turn[HF] = statistics.median(peer.steps(batch.kind, file, mask))
        turn[NAIVE] = timed(lambda: full_sort(logits, batch.rows))
        found.append(turn)
    return found


def row_of(rounds: Sequence[dict[str, float]]) -> list[str]:
    cells = [f"{1e3 * statistics.median(r[OURS] for r in rounds):.2f}"]
    cells.append(f"{1e3 * min(r[OURS] for r in rounds):.2f}")
    for name in (HF, NAIVE):
        if name in rounds[0]:
            cells.append(f"{1e3 * statistics.median(r[name] for r in rounds):.2f}")
            cells.append(f"{statistics.median(r[name] / r[OURS] for r in rounds):.1f}")
    return cells


def print_steps(
    grammars: dict[int, Grammar], peer: Peer | None, batches: Sequence[int], rounds: int, work: Path
) -> None:
    """The first and the last table."""
    rows, shares = [], []
    for vocabulary, grammar in grammars.items():
        cases = [("peaked", size) for size in batches] + [("flat", FLAT_BATCH)]
        for logits_kind, size in cases:
            logits = make_logits(size, vocabulary, logits_kind == "flat", SEED)
            for kind in KINDS:
                found = measure(Batch(kind, size, vocabulary, grammar), logits, peer, rounds, work)
                rows.append([kind, logits_kind, f"{vocabulary:,}", str(size), *row_of(found)])
                if kind == "JSON":
                    share = statistics.median(r["grammar"] / r[OURS] for r in found)
                    ms = 1e3 * statistics.median(r["grammar"] for r in found) / size
                    name = [logits_kind, f"{vocabulary:,}", str(size)]
                    shares.append([*name, f"{ms:.3f}", f"{share:.0%}"])
            print(f"done: {vocabulary:,} {logits_kind}, batch {size}", file=sys.stderr)
    peers = [HF, f"{HF}/{OURS}"] if peer else []
    header = ["kind", "logits", "vocabulary", "batch", f"{OURS}, ms", "least"]
    print_table([*header, *peers, NAIVE, f"{NAIVE}/{OURS}"], rows, left=2)
    print_table(["JSON: mask, advance", "vocabulary", "batch", "ms a row", "of the step"], shares)


# --- beside a decode step -------------------------------------------------------------------------


def print_decode_shares(
    model: Path, grammar: Grammar, batches: Sequence[int], threads: int, steps: int
) -> None:
    """What each kind costs beside the decode step whose logits it samples."""
    room = CONTEXT + 8
    runner = Runner(model, slots=max(batches), max_length=room, threads=threads)
    print(f"{model.name}: {runner.device_line}")
    rows = []
    prompts = np.random.default_rng(SEED).integers(0, 5_000, (max(batches), CONTEXT)).tolist()
    for slot, prompt in enumerate(prompts):
        runner.prefill(slot, prompt)
    for size in batches:
        shares = sorted({1, threads}) if size > 1 else [1]
        every = {
            (kind, by): Batch(kind, size, _columns(grammar, runner), grammar, by)
            for kind in KINDS
            for by in shares
        }
        found: dict[tuple[str, int], list[tuple[float, float]]] = {each: [] for each in every}
        for step in range(steps + 1):  # the first warms up
            for each, batch in every.items():
                began = time.perf_counter()
                logits = runner.decode([7 + step] * size, [CONTEXT] * size)
                decode = time.perf_counter() - began
                [times] = our_steps(batch, logits, 1)
                if step:
                    found[each].append((decode, sum(times)))
        for (kind, by), pairs in found.items():
            decodes, samples = zip(*pairs, strict=True)
            share = statistics.median(b / a for a, b in pairs)
            cells = [f"{1e3 * statistics.median(each):.2f}" for each in (decodes, samples)]
            least = f"{min(samples) / min(decodes):.1%}"
            rows.append([kind, str(size), str(by), *cells, f"{share:.1%}", least])
    runner.close()
    header = ["kind", "batch", "threads", "decode, ms", "sample, ms", "share", "of the least"]
    print_table(header, rows)


def _columns(grammar: Grammar, runner: Runner) -> int:
    """Tokens that are sampled from: as many as the mask has bits, or the model has logits."""
    mask = grammar.matcher().mask()
    assert mask is not None
    return min(32 * mask.size, runner.vocab_size)


# --- the run --------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="for the shares of decode steps")
    parser.add_argument("--hf-python", type=Path, default=PEER_PYTHON, help="parity environment")
    parser.add_argument("--threads", type=int, default=2, help="of the peer and of the runner")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="decode steps of each kind")
    parser.add_argument("--quick", action="store_true", help="a smoke run; means nothing")
    return parser.parse_args()


def print_setting(peer: Peer | None, threads: int) -> None:
    found = ", ".join(f"{name} {version(name)}" for name in ("numba", "numpy", "llguidance"))
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: Python {platform.python_version()}, {found}")
    if peer:
        said = ", ".join(f"{name} {version}" for name, version in peer.versions.items())
        print(f"peer: {said}, {threads} threads")
    busy = f"others take {busy_share():.0%} of the processors as it begins"
    print(f"{os.cpu_count()} cores, {busy}")
    print(f"the kernels are ready after {timed(lambda: HostSampler(32_000)):.2f} s")


def main() -> None:
    arguments = parse_arguments()
    peer = None
    if arguments.hf_python.is_file():
        peer = Peer(arguments.hf_python, arguments.threads)
    else:
        print("no HF: make .venv-parity/installed, or --hf-python", file=sys.stderr)
    print_setting(peer, arguments.threads)
    batches = BATCHES[:1] if arguments.quick else BATCHES
    rounds, steps = (1, 2) if arguments.quick else (arguments.rounds, arguments.steps)
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        grammars = {
            size: make_grammar(size, Path(work) / str(size))
            for size in (VOCABULARIES[:1] if arguments.quick else VOCABULARIES)
        }
        print_steps(grammars, peer, batches, rounds, Path(work))
        if arguments.model.is_dir():
            largest = grammars[max(grammars)]
            print_decode_shares(arguments.model, largest, batches, arguments.threads, steps)
        else:
            print(f"no shares of decode steps: {arguments.model} is not there", file=sys.stderr)
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
