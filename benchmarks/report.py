"""Tables of figures for people, and the same figures as JSON.

Each line is a system: its speed over all rounds, and how many times as fast the first one is,
within rounds. Knows nothing of systems or of kinds of work.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from turns import Spread, Turn, agreement, rates, ratio

from orchestrator.terminal import print_table

Rounds = Sequence[Mapping[str, Turn]]
Rate = Callable[[Turn], float]
HEADER = ("system", "tokens/s", "least", "most", "fastest")
RATIO = ("least", "most", "fastest", "aim", "same tokens", "others took")


@dataclass(frozen=True, slots=True)
class Figures:
    """One table: what was done, each system's rates, the first one's ratios to the others."""

    title: str
    reduced: bool
    facts: Mapping[str, object]
    rates: Mapping[str, Mapping[str, Spread]]
    ratios: Mapping[str, Spread]
    inverse: bool
    aims: Mapping[str, float]
    agreement: Mapping[str, tuple[int, int, int]]
    others: Mapping[str, tuple[float, float]]


def figures(
    title: str,
    rounds: Rounds,
    rate: Rate,
    aims: Mapping[str, float],
    *,
    reduced: bool,
    facts: Mapping[str, object],
    also: Mapping[str, Rate] | None = None,
    inverse: bool = False,
) -> Figures:
    """The first system is compared with each; `also`: more columns, by heading.

    `inverse`: the ratios are those of each system to the first one, not of the first one to each.
    """
    names = list(rounds[0])
    first = names[0]
    by_rate = {"tokens/s": rates(rounds, rate)}
    by_rate |= {heading: rates(rounds, other) for heading, other in (also or {}).items()}
    mine = rounds[-1][first].tokens
    total = sum(map(len, mine))
    taken = {name: [each[name].others for each in rounds] for name in names}
    return Figures(
        title,
        reduced,
        facts,
        {name: {heading: found[name] for heading, found in by_rate.items()} for name in names},
        {
            name: ratio(rounds, *((name, first) if inverse else (first, name)), rate)
            for name in names[1:]
        },
        inverse,
        aims,
        {n: (*agreement(mine, rounds[-1][n].tokens), total) for n in names[1:]},
        {name: (min(values), max(values)) for name, values in taken.items()},
    )


def print_figures(found: Figures) -> None:
    """The table on stdout; what is reduced says so."""
    print(f"\n{found.title}{' (reduced)' if found.reduced else ''}")
    first = next(name for name in found.rates if name not in found.ratios)
    more = [heading for heading in found.rates[first] if heading != "tokens/s"]
    rows = []
    for name, by_heading in found.rates.items():
        speed = by_heading["tokens/s"]
        cells = [
            name,
            *_cells(speed, "{:.1f}"),
            *(_cell(by_heading[m].median, "{:.0f}") for m in more),
        ]
        taken = " to ".join(_cell(share, "{:.0%}") for share in found.others[name])
        rows.append([*cells, *_ratio_cells(found, name), taken])
    compared = f"it / {first}" if found.inverse else f"{first} / it"
    print_table((*HEADER, *more, compared, *RATIO), rows)


def _ratio_cells(found: Figures, name: str) -> list[str]:
    if name not in found.ratios:
        return ["", "", "", "", "", ""]
    aim = f"{found.aims[name]:.2f}" if name in found.aims else ""
    _, begun, total = found.agreement[name]
    return [*_cells(found.ratios[name], "{:.3f}"), aim, f"{begun / total:.0%}"]


def _cells(spread: Spread, form: str) -> list[str]:
    return [_cell(each, form) for each in (spread.median, spread.least, spread.most, spread.best)]


def _cell(figure: float, form: str) -> str:
    """A dash for what could not be told, as the steps of a system that split the rows."""
    return "-" if math.isnan(figure) else form.format(figure)


@dataclass
class Report:
    """All tables of a run, and the file that gets them as JSON after each."""

    setting: Mapping[str, object]
    file: Path | None = None
    tables: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: Figures) -> None:
        print_figures(found)
        self.tables.append(asdict(found))
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            whole = {**self.setting, "tables": self.tables}
            self.file.write_text(json.dumps(whole, indent=1) + "\n")
