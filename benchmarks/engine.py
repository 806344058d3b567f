"""Tokens a second: the bare engine, the whole path, onnxruntime-genai's generator; one table.

All do the same work on the same files with as many threads: the same prompts (equal token ids),
as many new tokens for each (the EOS ids are biased away), prefill included, loading excluded.

- engine: `Engine` on `Runner`, every completion admitted at once; greedy, and temperature 1 with
  top_p 0.95.
- whole path: what `penstock run` does, from reading the YAML to the COMMIT that ends the last
  request: plan, SQLite, a nudge through Celery's embedded transport, claims, flushes, the status
  polled; without graders and without drawing the progress bar. The worker waits when it begins.
- genai: `og.Generator` on static batches of as many rows as there are slots, greedy, in a process
  of its own (genai_peer.py).

They take turns, so that a change of the machine's mood meets all of them; ratios are made within
a round. How each system is run and timed stands in systems.py.
"""

import argparse
import os
import platform
import random
import statistics
import string
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from stopwatch import busy_share
from systems import BIAS, Load, Measured, Peer, System, bare_engine, shares, whole_path

from orchestrator.queue import Queue
from orchestrator.settings import Settings
from orchestrator.terminal import print_table
from workers.folder import find_model
from workers.process import LoadedModel
from workers.sampler import Sampling

HERE = Path(__file__).parent
MODEL = HERE / "models" / "qwen2.5-0.5b-int4"
PEER_PYTHON = HERE.parent / ".venv-parity" / "bin" / "python"
WARM_UP_TOKENS = 4
TRIES = 50
ENGINE, PATH, GENAI, SAMPLED = "engine", "whole path", "genai", "engine, sampled"


def make_load(model: LoadedModel, requests: int, prompt: int, new: int, seed: int) -> Load:
    """Random words whose rendered prompts have exactly `prompt` tokens each."""
    source = random.Random(seed)
    texts = tuple(_words(model, prompt, source) for _ in range(requests))
    prompts = tuple(tuple(_encode(model, words)) for words in texts)
    return Load(prompts, texts, new, model.runner.slots)


def _words(model: LoadedModel, length: int, source: random.Random) -> str:
    for _ in range(200):
        words: list[str] = []
        for _ in range(4 * length):
            letters = source.choices(string.ascii_lowercase, k=source.randint(1, 8))
            words.append("".join(letters))
            found = len(_encode(model, " ".join(words)))
            if found == length:
                return " ".join(words)
            if found > length:
                words.pop()
    raise SystemExit(f"no text makes a prompt of {length} tokens: try another --prompt")


def _encode(model: LoadedModel, words: str) -> list[int]:
    return model.tokenizer.encode(model.template.render([{"role": "user", "content": words}]))


def print_speeds(rounds: Sequence[dict[str, Measured]], load: Load) -> None:
    """Tokens a second by system, and the ratios within rounds."""
    rows = []
    for name in rounds[0]:
        speeds = [load.total / each[name].seconds for each in rounds]
        seconds = statistics.median(each[name].seconds for each in rounds)
        others = max(each[name].others for each in rounds)
        rows.append([name, *_spread(speeds, "{:.1f}"), f"{seconds:.2f}", f"{others:.0%}"])
    for upper, lower in ((PATH, ENGINE), (ENGINE, GENAI), (SAMPLED, ENGINE)):
        if upper in rounds[0] and lower in rounds[0]:
            ratios = [each[lower].seconds / each[upper].seconds for each in rounds]
            rows.append([f"{upper} / {lower}", *_spread(ratios, "{:.3f}"), "", ""])
    print_table(("new tokens/s", "median", "least", "most", "seconds", "others took"), rows)


def _spread(values: Sequence[float], form: str) -> list[str]:
    return [form.format(value) for value in (statistics.median(values), min(values), max(values))]


def print_shares(rounds: Sequence[dict[str, Measured]]) -> None:
    """Median milliseconds by part: of the run, by decode step, and by call."""
    rows = []
    for name in (ENGINE, SAMPLED, PATH):
        for part in shares(rounds[0][name]):
            seconds = statistics.median(shares(each[name])[part] for each in rounds)
            steps = statistics.median(each[name].watch.calls["decode"] for each in rounds)
            calls = statistics.median(each[name].watch.calls.get(part, 0) for each in rounds)
            rows.append(
                [
                    *(name, part, f"{1e3 * seconds:.0f}", f"{1e3 * seconds / steps:.2f}"),
                    *((f"{calls:.0f}", f"{1e3 * seconds / calls:.2f}") if calls else ("", "")),
                ]
            )
    header = ("where it goes", "part", "ms", "ms/step", "calls", "ms/call")
    print_table(header, rows, left=2)


def print_agreement(last: dict[str, Measured]) -> None:
    """How many requests got the same tokens as from the bare engine."""
    mine = last[ENGINE].tokens
    for name in (PATH, GENAI):
        if name in last:
            same = sum(a == b for a, b in zip(mine, last[name].tokens, strict=True))
            print(f"same tokens, {name} and {ENGINE}: {same} of {len(mine)} requests")


# --- the run --------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(MODEL), help="a folder, or tiny")
    parser.add_argument("--genai-python", type=Path, default=PEER_PYTHON, help="parity environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", type=float, default=1.0, help="a turn with more is taken again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=HERE.parent / "out", help="for the database")
    parser.add_argument("--quick", action="store_true", help="a smoke run on tiny; means nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.model, arguments.new, arguments.rounds = "tiny", 32, 2
    return arguments


def print_setting(arguments: argparse.Namespace, model: LoadedModel, peer: Peer | None) -> None:
    runtime = next(
        name for name in ("onnxruntime-gpu", "onnxruntime") if _installed(name) is not None
    )
    packages = [runtime, "numpy", "sqlalchemy", "celery", "tokenizers"]
    found = {"Python": platform.python_version(), **{name: _installed(name) for name in packages}}
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {_listed(found)}")
    print(f"peer: {_listed(peer.versions)}" if peer else "no peer")
    print(f"{model.folder.name}: {model.runner.device_line}; {os.cpu_count()} cores")
    print(
        f"{arguments.requests} requests of {arguments.prompt} + {arguments.new} tokens, "
        f"{arguments.slots} slots, {arguments.rounds} rounds"
    )


def _listed(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:  # PackageNotFoundError is one
        return None


def measure(
    systems: dict[str, System], load: Load, rounds: int, others: float
) -> list[dict[str, Measured]]:
    """Every system's turn, round after round, after an unmeasured one with few tokens."""
    warm_up = replace(load, new_tokens=min(WARM_UP_TOKENS, load.new_tokens))
    for system in systems.values():
        system(warm_up)
    found = []
    for number in range(1, rounds + 1):
        turn = {name: _undisturbed(system, load, others) for name, system in systems.items()}
        said = ", ".join(f"{name} {each.seconds:.2f} s" for name, each in turn.items())
        print(f"round {number}: {said}", file=sys.stderr)
        found.append(turn)
    return found


def _undisturbed(system: System, load: Load, others: float) -> Measured:
    """A turn in which other processes took no more than the share `others` of the processors.

    One with more is left out whatever its figures, and taken again once the machine is quiet.
    """
    for _ in range(TRIES):
        while others < 1 and busy_share() > others:
            pass
        measured = system(load)
        counts = {len(tokens) for tokens in measured.tokens}
        assert counts == {load.new_tokens}, f"{counts} new tokens"
        if not measured.others > others:
            return measured
        said = f"{measured.seconds:.2f} s, others took {measured.others:.0%}"
        print(f"left out, disturbed: {said}", file=sys.stderr)
    raise SystemExit(f"{TRIES} turns on end were disturbed: the machine is too busy to measure")


def main() -> None:
    arguments = parse_arguments()
    if arguments.model == str(MODEL) and not MODEL.is_dir():
        raise SystemExit(
            f"{MODEL} is not there: make .venv-parity/installed, then "
            ".venv-parity/bin/python benchmarks/make_model.py; or give --model or --quick"
        )
    settings = replace(
        Settings.from_env(),
        broker_url="memory://",
        threads=arguments.threads,
        slots=arguments.slots,
    )
    model = LoadedModel.load(find_model(arguments.model, settings.models_dir), settings)
    load = make_load(model, arguments.requests, arguments.prompt, arguments.new, arguments.seed)
    greedy = Sampling(temperature=0, logit_bias=tuple((id, BIAS) for id in sorted(model.eos)))
    sampled = replace(greedy, temperature=1.0, top_p=0.95)
    peer = None
    if arguments.genai_python.is_file():
        peer = Peer(arguments.genai_python, model.folder.path, arguments.threads)
    else:
        print("no genai: make .venv-parity/installed, or --genai-python", file=sys.stderr)
    print_setting(arguments, model, peer)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=arguments.work, prefix="bench-") as work,
        closing(Queue(settings)) as queue,
    ):
        job = Path(work).resolve() / "bench.yaml"
        systems: dict[str, System] = {
            ENGINE: lambda load: bare_engine(model, load, greedy),
            PATH: lambda load: whole_path(model, load, settings, queue, job),
            **({GENAI: peer} if peer else {}),
            SAMPLED: lambda load: bare_engine(model, load, sampled),
        }
        rounds = measure(systems, load, arguments.rounds, arguments.others)
    if peer:
        peer.close()
    print_speeds(rounds, load)
    print_shares(rounds)
    print_agreement(rounds[-1])


if __name__ == "__main__":
    main()
