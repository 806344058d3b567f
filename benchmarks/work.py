"""Penstock beside its peers, one table for each kind of work: `python benchmarks/work.py --help`.

All systems get the same weights and the same prompts (token ids), make as many new tokens for each,
have as many threads and rows, and take turns; ratios are made within a round. Prompts count in the
time, loading does not. Which systems meet at which work, and the aims, stand here; what each kind
of work is, in loads.py; how a system is started, in systems.py.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ceiling import bandwidth, weight_bytes
from everything import AIM, FULL_POSTGRES, FULL_SQLITE, everything, print_where
from loads import BATCHES, MIXED_SLOTS, SHORT, SIZES, TINY, Size, make, point
from report import Figures, Report, figures
from setting import setting
from systems import (
    CONTINUOUS,
    ENGINE,
    GENAI,
    GENAI_ENGINE,
    HERE,
    LLAMA,
    LLAMA_COPIED,
    PEERS,
    PRECISIONS,
    SAMPLED,
    STATIC,
    Fleet,
    fleet,
)
from turns import System, take_turns

from orchestrator.settings import Settings
from workers.drawing.sampler import Sampling

ROWS = 16
# What each kind of work is compared with, and how many times as fast the engine is to be.
AIMS: Mapping[str, Mapping[str, float]] = {
    "decode": {GENAI: 1.0, GENAI_ENGINE: 1.0, LLAMA: 1.0, STATIC: 1.0},
    "mixed": {GENAI: 1.4, GENAI_ENGINE: 1.4, LLAMA: 1.1, STATIC: 1.4, CONTINUOUS: 1.1},
    "sweep": {GENAI: 2.5, LLAMA: 2.5, LLAMA_COPIED: 1.0, CONTINUOUS: 1.0},
    "fewshot": {GENAI: 1.5, LLAMA: 1.5, LLAMA_COPIED: 1.5, CONTINUOUS: 1.5},
    "everything": {FULL_SQLITE: AIM, FULL_POSTGRES: AIM},
    "single": {GENAI: 1.0, LLAMA: 1.0},
}
CEILING_AIM = 0.80


@dataclass(frozen=True, slots=True)
class Asked:
    """One run: sizes by kind, and what the command line says."""

    sizes: Mapping[str, Size]
    reduced: bool
    options: argparse.Namespace
    settings: Settings

    def seeds(self, kind: str) -> list[int]:
        """One for each round, and the last for the turns that are not measured."""
        first: int = self.options.seed
        return list(range(first, first + self.sizes[kind].rounds + 1))


def compared(asked: Asked, found: Fleet, kind: str, rows: int) -> Figures:
    """All systems that are there, at one kind of work in `rows` rows at once."""
    size, ids = asked.sizes[kind], found.ours.ids
    works = [make(kind, size, rows, ids, seed) for seed in asked.seeds(kind)]
    systems: dict[str, System] = {ENGINE: found.ours.greedy}
    if kind == "sweep":
        sampled = found.ours.another()
        systems[SAMPLED] = lambda work: sampled(work, swept)
    systems |= {name: found.peers[name] for name in AIMS[kind] if name in found.peers}
    rounds = take_turns(systems, works, asked.options.others, warm=works.pop())
    prompt_tokens = sum(map(len, works[0].prompts))
    stepwise = kind in ("decode", "single")
    return figures(
        f"{kind}, {found.precision}, {rows} row{'s' * (rows > 1)}: {_said(kind, size)}",
        rounds,
        (lambda turn: turn.decode_rate(rows)) if stepwise else (lambda turn: turn.rate),
        AIMS[kind],
        reduced=asked.reduced,
        facts=_facts(asked, kind, found, rows),
        also={"prompts": lambda turn: turn.prompt_rate(prompt_tokens, rows)} if stepwise else None,
    )


def swept(request: int) -> Sampling:
    """The parameters of one point of the sweep."""
    temperature, seed = point(request)
    return Sampling(temperature=temperature, seed=seed)


def _said(kind: str, size: Size) -> str:
    prompts = f"{size.prompts} prompts of {size.length} tokens"
    said = {
        "decode": f"one prompt of {size.length} tokens a row, {size.new} new; steps alone",
        "single": f"a prompt of {size.length} tokens, {size.new} new; steps alone",
        "mixed": f"{prompts}, up to {size.new} new",
        "sweep": f"{prompts}, each at 16 points, {size.new} new",
        "fewshot": f"{prompts}, {size.shared} of them common to all, {size.new} new",
    }
    return f"{said[kind]}; {size.rounds} rounds"


def _facts(asked: Asked, kind: str, found: Fleet, rows: int) -> dict[str, object]:
    facts: dict[str, object] = {"work": kind, "precision": found.precision, "rows": rows}
    facts["size"] = asdict(asked.sizes[kind])
    facts["full size"] = asdict(SIZES[kind])
    return facts | {"device": found.ours.model.runner.device_line, "peers": found.versions}


def single(asked: Asked, found: Fleet, report: Report) -> None:
    """One row's steps, and which part of the reading speed of the memory they reach."""
    threads = asked.options.threads
    measured = [bandwidth(threads)]
    table = compared(asked, found, "single", 1)
    measured.append(bandwidth(threads))
    read = weight_bytes(found.ours.model.folder.graph)
    ceiling = max(measured) / read
    reached = table.rates[ENGINE]["tokens/s"].best / ceiling
    facts = {"bandwidth": max(measured), "weight bytes": read, "of the ceiling": reached}
    report.add(replace(table, facts={**table.facts, **facts, "ceiling aim": CEILING_AIM}))
    print(
        f"{read / 1e6:,.0f} MB of weights a token, {max(measured) / 1e9:.1f} GB/s: at most "
        f"{ceiling:.1f} tokens/s; the engine's fastest turn has {reached:.2f} of it, "
        f"aim {CEILING_AIM:.2f}"
    )


def add_everything(asked: Asked, found: Fleet, report: Report) -> None:
    size, options = asked.sizes["everything"], asked.options
    table = everything(
        found.ours,
        size,
        ROWS,
        asked.seeds("everything"),
        options.others,
        asked.settings,
        options.work_folder,
        reduced=asked.reduced,
    )
    report.add(table)
    print_where(table.facts["where it goes"])


def one_precision(asked: Asked, kinds: Sequence[str], precision: str, report: Report) -> None:
    options = asked.options
    names = {name for kind in kinds for name in AIMS[kind]}
    names = {name for name in names if PEERS.get(name) in options.peers}
    rows_of = {"decode": options.batches, "mixed": options.mixed_slots}
    with fleet(options.shape, precision, names, options.threads, asked.settings) as found:
        print(f"{precision}: {found.ours.model.runner.device_line}", file=sys.stderr)
        for kind in kinds:
            if kind == "single":
                single(asked, found, report)
            elif kind == "everything":
                add_everything(asked, found, report)
            else:
                for rows in rows_of.get(kind, [ROWS]):
                    report.add(compared(asked, found, kind, min(rows, ROWS)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", choices=[*AIMS, "all"], nargs="+", default=["all"])
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", help="default: the table's")
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="as make_model.py was given")
    parser.add_argument("--peers", choices=sorted(set(PEERS.values())), nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="of decode")
    parser.add_argument("--mixed-slots", type=int, nargs="+", default=MIXED_SLOTS)
    parser.add_argument("--prompts", type=int, help="in place of the kind's own")
    parser.add_argument("--new", type=int, help="new tokens at most, in place of the kind's own")
    parser.add_argument("--rounds", type=int, help="in place of the kind's own")
    parser.add_argument("--short", action="store_true", help="smaller sizes: some 20 minutes")
    parser.add_argument("--quick", action="store_true", help="a smoke run, on tiny; means nothing")
    parser.add_argument("--others", type=float, default=1.0, help="a turn with more is taken again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=HERE.parent / "out" / "benchmarks.json")
    parser.add_argument("--work-folder", type=Path, default=HERE.parent / "out", help="databases")
    options = parser.parse_args()
    if options.quick and options.shape == parser.get_default("shape"):
        options.shape = "tiny"
    if options.peers is None:
        options.peers = [] if options.shape == "tiny" else sorted(set(PEERS.values()))
    return options


def sized(options: argparse.Namespace) -> dict[str, Size]:
    """By kind of work; what the command line says goes before everything else."""
    base = TINY if options.quick else SHORT if options.short else SIZES
    given = {name: getattr(options, name) for name in ("prompts", "new", "rounds")}
    given = {name: value for name, value in given.items() if value is not None}
    return {kind: replace(size, **given) for kind, size in base.items()}


# Decoding is compared in all; the larger tables in those that bulk work is done in.
BULK = ("w8a8", "int4")
DEFAULT_PRECISIONS = {"decode": PRECISIONS, "single": PRECISIONS, "everything": ("int4",)}


def main() -> None:
    options = parse_arguments()
    kinds = list(AIMS) if "all" in options.work else options.work
    sizes = sized(options)
    longest = max(size.length + size.new for size in sizes.values())
    settings = replace(
        Settings.from_env(),
        broker_url="memory://",
        threads=options.threads,
        slots=ROWS,
        max_context=max(256, -(-longest // 64) * 64),
    )
    reduced = any(sizes[kind] != SIZES[kind] for kind in kinds)
    asked = Asked(sizes, reduced, options, settings)
    said = setting(options.shape, options.threads)
    print("\n".join(f"{name}: {value}" for name, value in said.items()))
    if reduced:
        print("reduced: smaller sizes than those of the tables, see each title")
    report = Report(said, options.json)
    for precision in PRECISIONS:
        chosen = [k for k in kinds if precision in (options.precision or precisions(options, k))]
        if chosen:
            one_precision(asked, chosen, precision, report)
    print(f"\nall figures: {options.json}", file=sys.stderr)


def precisions(options: argparse.Namespace, kind: str) -> Sequence[str]:
    return ("int4",) if options.shape == "tiny" else DEFAULT_PRECISIONS.get(kind, BULK)


if __name__ == "__main__":
    main()
