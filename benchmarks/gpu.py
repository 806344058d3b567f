"""A GPU beside its ceiling and Hugging Face, at the shape of Llama 3.1 8B: one command, 5 tables.

    .venv/bin/python benchmarks/gpu.py --hf-python PYTHON     # with torch for CUDA and transformers

Makes the model (gpu_model.py), measures the device's bandwidth, then decode steps of equal lengths
at batch 1 to 256, whether a row's numbers depend on the batch, what fixed shapes cost, and whole
loads through the engine. `--quick` is the same script on the processor with a tiny model.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from gpu_model import SHAPES, SIZES, make
from loads import SIZES as LOADS
from loads import TINY, Ids, point
from loads import make as make_load
from peer_side import Work
from peers import PeerProcess
from setting import setting

from workers.drawing.device_sampler import DeviceSampler, sampler_of
from workers.drawing.sampler import Sampled, SamplerRow, Sampling
from workers.engine.engine import Choice, Completion, Engine, Tokens
from workers.measuring.costs import step_costs
from workers.running.runner import Runner
from workers.words.tokenizer import Tokenizer

HERE = Path(__file__).parent
AIM, AIM_BATCH = 0.6, 64
MEASURED = 2**30  # bytes whose copy is timed
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1, top_p=0.95)
Rows = list[list[str]]


@dataclass(frozen=True, slots=True)
class Asked:
    device: str
    batches: tuple[int, ...]
    prompt: int
    new: int
    rounds: int
    quick: bool

    @property
    def length(self) -> int:
        """Positions of a row: for the longest request of any table."""
        loads = TINY if self.quick else LOADS
        longest = max(loads[kind].length + loads[kind].new for kind in ("mixed", "sweep"))
        return max(self.prompt + self.new + 1, longest)


def open_runner(folder: Path, asked: Asked, slots: int, deterministic: bool = False) -> Runner:
    fixed = {"device": asked.device, "deterministic": deterministic}
    return Runner(folder, slots=slots, max_length=asked.length, **fixed)


def bandwidth(runner: Runner) -> float:
    """Bytes a second of a copy within the device, read and written; of three the best."""
    room, size = getattr(runner.place, "room", None), MEASURED
    if room is None:
        source, target = np.ones(size // 8, np.uint8), np.zeros(size // 8, np.uint8)
        return _best(lambda: np.copyto(target, source), 2 * source.nbytes)
    source, target = room.allocate(size), room.allocate(size)
    done = np.empty(1, np.uint8)

    def copy() -> None:
        for _ in range(8):
            room.copy(target, size, source, size, size, 1)
        room.download(done, target)

    found = _best(copy, 16 * size)
    room.free(source)
    room.free(target)
    return found


def _best(work: Callable[[], Any], nbytes: int) -> float:
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return nbytes / min(seconds[1:])


def seated(runner: Runner, batch: int, prompt: Sequence[int]) -> None:
    """The same prompt in rows 0..batch-1."""
    runner.prefill(0, prompt)
    for row in range(1, batch):
        runner.copy(0, row, len(prompt))


def decode(runner: Runner, sampler: Any, batch: int, asked: Asked, sampling: Sampling) -> float:
    """Seconds of a step of `batch` rows, forward pass and sampling: the median of `new` steps."""
    prompt = list(range(300, 300 + asked.prompt))
    seated(runner, batch, prompt)
    rows = [SamplerRow(sampling, choice) for choice in range(batch)]
    tokens, lengths, seconds = np.full(batch, 301), np.full(batch, len(prompt)), []
    for _ in range(asked.new):
        began = time.perf_counter()
        outcomes = sampler.sample(runner.decode(tokens, lengths), range(batch), rows)
        seconds.append(time.perf_counter() - began)
        found = [each.token for each in outcomes if isinstance(each, Sampled)]
        assert len(found) == batch, outcomes
        for row, token in zip(rows, found, strict=True):
            row.advance(token)
        tokens, lengths = np.array(found), lengths + 1
    return statistics.median(seconds[1:])


def decode_table(
    runner: Runner, sampler: Any, asked: Asked, peer: PeerProcess | None, rate: float
) -> Rows:
    """Tokens a second by batch: greedy, sampled, the peer's, and what reading the bytes allows."""
    graph = onnx.load(runner.graph, load_external_data=False).graph
    weights, table = step_costs(graph).weight_bytes, []
    for batch in asked.batches:
        runs = [decode(runner, sampler, batch, asked, GREEDY) for _ in range(asked.rounds)]
        mine = batch / statistics.median(runs)
        drawn = batch / decode(runner, sampler, batch, asked, DRAWN)
        read = weights + batch * (asked.prompt + asked.new / 2) * runner.kv_bytes_per_token
        ceiling = batch * rate / read
        other = peer_rate(peer, batch, asked)
        cells = [mine, 1e3 * batch / mine, drawn, other, mine / other, ceiling]
        table.append([str(batch), *map(_number, cells), f"{mine / ceiling:.2f}"])
    return table


def peer_rate(peer: PeerProcess | None, batch: int, asked: Asked) -> float:
    if peer is None:
        return float("nan")
    work = Work([list(range(300, 300 + asked.prompt))] * batch, [asked.new] * batch, batch, [])
    peer.turn("static", work)  # unmeasured: kernels are chosen, memory is taken
    return max(peer.turn("static", work).decode_rate(batch) for _ in range(2))


def fallbacks(sampler: Any) -> str:
    """How often the host had to sample what the device could not decide."""
    if not isinstance(sampler, DeviceSampler) or not sampler.sampled:
        return "the host's sampler"
    return f"{sampler.fallen_back / sampler.sampled:.2%} of {sampler.sampled} rows fell back"


def invariance(runner: Runner, asked: Asked) -> Rows:
    """The same row alone and in batches: the largest difference of a logit, rows that are equal."""
    prompts = [
        list(range(300 + i, 300 + i + asked.prompt - i % 7)) for i in range(max(asked.batches))
    ]
    firsts: dict[int, np.ndarray[Any, Any]] = {}
    table = []
    for batch in asked.batches:
        for row, prompt in enumerate(prompts[:batch]):
            runner.prefill(row, prompt)
        lengths = [len(prompt) for prompt in prompts[:batch]]
        logits = np.array(runner.decode([301] * batch, lengths))
        off, same, known = 0.0, 0, 0
        for row, values in enumerate(logits):
            if row in firsts:
                known += 1
                off = max(off, float(np.abs(values - firsts[row]).max()))
                same += bool((values == firsts[row]).all())
            firsts.setdefault(row, values)
        table.append([str(batch), f"{same} of {known}", f"{off:.2g}"])
    return table


def engine_rate(engine: Engine, work: Work, samplings: Callable[[int], Sampling]) -> float:
    """New tokens a second of a whole load."""
    began, made = time.perf_counter(), 0
    engine.seat_only(None, work.rows)
    for i, (prompt, limit) in enumerate(zip(work.prompts, work.limits, strict=True)):
        engine.admit(Completion(i, tuple(prompt), samplings(i), (Choice(0),), limit))
    while not engine.idle:
        made += sum(len(e.tokens) for e in engine.step() if isinstance(e, Tokens))
    assert made == sum(work.limits), (made, work.limits)
    return made / (time.perf_counter() - began)


def loads_table(runner: Runner, asked: Asked, peer: PeerProcess | None, vocab: int) -> Rows:
    """Mixed lengths and a sweep through the engine; the peer in static batches, greedy."""
    sizes, rows = (TINY if asked.quick else LOADS), min(max(asked.batches), 64)
    tokenizer = Tokenizer(runner.folder.path)
    table = []
    for kind in ("mixed", "sweep"):
        engine = Engine(runner, tokenizer, frozenset(), sampler_of(runner, tokenizer.vocab_size))
        work = make_load(kind, sizes[kind], rows, Ids(vocab, ()), seed=1)
        mine = engine_rate(engine, work, _greedy if kind == "mixed" else _of_point)
        engine.close()
        other = peer.turn("static", work).rate if peer else float("nan")
        table.append([kind, str(rows), *map(_number, (mine, other, mine / other))])
    return table


def _greedy(_: int) -> Sampling:
    return GREEDY


def _of_point(request: int) -> Sampling:
    temperature, seed = point(request)
    return Sampling(temperature=temperature, seed=seed)


def _number(value: float) -> str:
    return "" if value != value else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def show(title: str, head: str, rows: Iterable[Sequence[str]]) -> None:
    columns = head.split(" | ")
    print(f"\n### {title}\n\n| {head} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def measure(folder: Path, asked: Asked, peer: PeerProcess | None, shape: str) -> dict[str, Rows]:
    runner, slots = open_runner(folder, asked, max(asked.batches)), max(asked.batches)
    sampler = sampler_of(runner, SHAPES[shape].vocab)
    for name, value in setting(shape, runner.threads).items():
        print(f"{name}: {value}")
    rate = bandwidth(runner)
    print(f"{runner.device_line}\ncopy bandwidth: {rate / 1e9:.0f} GB/s")
    found = {"decode": decode_table(runner, sampler, asked, peer, rate)}
    head = "batch | tokens/s | ms | sampled | Hugging Face | ratio | ceiling | fraction"
    show(f"Decode, prompt {asked.prompt}, {asked.new} new", head, found["decode"])
    print(f"\nAim: {AIM} of the ceiling at batch {AIM_BATCH}. Sampling: {fallbacks(sampler)}.")
    head = "batch | rows equal to their first | largest difference of a logit"
    found["invariance"] = invariance(runner, asked)
    show("A row in other batches", head, found["invariance"])
    found["loads"] = loads_table(runner, asked, peer, SHAPES[shape].vocab)
    head = "load | rows | tokens/s | Hugging Face, static | ratio"
    show("Whole loads, prompts included", head, found["loads"])
    runner.close()
    runner = open_runner(folder, asked, slots, deterministic=True)
    found["deterministic"] = invariance(runner, asked)
    head = "batch | rows equal to their first | largest difference of a logit"
    show("A row in other batches, PENSTOCK_DETERMINISTIC=1", head, found["deterministic"])
    sampler = sampler_of(runner, SHAPES[shape].vocab)
    rates = [(b, b / decode(runner, sampler, b, asked, GREEDY)) for b in asked.batches]
    found["price"] = [[str(batch), _number(rate)] for batch, rate in rates]
    show(f"Its price: decode in shapes of {slots} rows", "batch | tokens/s", found["price"])
    runner.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--precision", choices=SIZES, default="bf16")
    parser.add_argument("--models", type=Path, default=HERE / "models")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf-python", type=Path, help="a Python with torch and transformers")
    parser.add_argument("--json", type=Path, help="where the tables go as well")
    parser.add_argument("--quick", action="store_true", help="a tiny model on the processor")
    options = parser.parse_args()
    if options.quick:
        options.device, options.shape, options.precision = "cpu", "smoke", "fp32"
        options.batches, options.prompt, options.new, options.rounds = "1,2,4", 12, 6, 1
    batches = tuple(int(batch) for batch in options.batches.split(","))
    asked = Asked(
        options.device, batches, options.prompt, options.new, options.rounds, options.quick
    )
    folder = options.models / f"gpu-{options.shape}-{options.precision}"
    make(folder, SHAPES[options.shape], options.precision)
    peer = None
    if options.hf_python:
        words = str(folder / "shape.json"), "--device", options.device
        peer = PeerProcess(options.hf_python, HERE / "gpu_peer.py", *words)
    found = measure(folder, asked, peer, options.shape)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
