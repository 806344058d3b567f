"""The grid of varied parameters: which points there are, and where each came from.

Checks the section's shape and its size before anything is expanded. Knows nothing of items, nor
of which values a parameter may have.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.spec.document import Document
from orchestrator.spec.params import NAMES
from orchestrator.spec.refusals import KeyPath, show

NEVER_SWEPT = ("functions", "messages", "model", "stream", "stream_options", "tools")
SWEEPABLE = tuple(name for name in NAMES if name not in NEVER_SWEPT)
MAX_POINTS = 100_000

Values = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Sweep:
    """`lists`: parameter → its values; `include`: points added; `exclude`: matches removed."""

    lists: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    include: tuple[Values, ...] = ()
    exclude: tuple[Values, ...] = ()

    @property
    def size(self) -> int:
        """The number of points before anything is excluded; nothing is expanded for it."""
        if self.include and not self.lists:
            return len(self.include)
        return math.prod(map(len, self.lists.values())) + len(self.include)


def same(value: object) -> str:
    """A text equal for equal values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, Mapping):
        inner = {key: same(each) for key, each in value.items()}
        return json.dumps(inner, sort_keys=True)
    if isinstance(value, list | tuple):
        return json.dumps([same(each) for each in value])
    return json.dumps(value)


def grid(lists: Mapping[str, Sequence[object]]) -> Iterator[Values]:
    """Every cell, in the order of the file, the last parameter fastest."""
    for cell in itertools.product(*lists.values()):
        yield dict(zip(lists, cell, strict=True))


def matches(point: Values, match: Values) -> bool:
    """Whether every parameter in `match` is in the point; a list in `match` means any of it."""
    return all(_matches(point[name], wanted) for name, wanted in match.items())


def _matches(value: object, wanted: object) -> bool:
    if isinstance(wanted, list | tuple) and any(same(value) == same(each) for each in wanted):
        return True
    return same(value) == same(wanted)


def expand(sweep: Sweep) -> Iterator[tuple[Values, int | None]]:
    """Each point's own parameters, and its position in `include` if it came from there.

    The grid less `exclude`, then `include`; no sweep at all: one point without parameters.
    """
    if sweep.lists or not sweep.include:
        for point in grid(sweep.lists):
            if not any(matches(point, match) for match in sweep.exclude):
                yield point, None
    for position, point in enumerate(sweep.include):
        yield point, position


def origin(sweep: Sweep, point: Values, included: int | None, name: str) -> KeyPath:
    """Where in the file the value of `name` at this point was written."""
    if name not in point:
        return ("params", name)
    if included is not None:
        return ("sweep", "include", included, name)
    index = [same(value) for value in sweep.lists[name]].index(same(point[name]))
    return ("sweep", name, index)


def places(sweep: Sweep, params: Values) -> Iterator[tuple[KeyPath, Values]]:
    """Every mapping of parameters in the file, with its path."""
    yield ("params",), params
    yield ("sweep",), sweep.lists
    for position, entry in enumerate(sweep.include):
        yield ("sweep", "include", position), entry


def read(document: Document, value: object) -> Sweep:
    """The file's `sweep` section, checked for its shape and size; values are checked later."""
    section = document.mapping(("sweep",), value, (*SWEEPABLE, "include", "exclude"))
    names = [key for key in section if key not in ("include", "exclude")]
    lists = {name: _list(document, name, section[name]) for name in names}
    include = _entries(document, "include", section, SWEEPABLE)
    exclude = _entries(document, "exclude", section, lists)
    for position, match in enumerate(exclude):
        _check_match(document, position, match, lists)
    sweep = Sweep(lists, include, exclude)
    if not lists and not include:
        raise document.refusal(("sweep",), "at least one parameter with its values", "none")
    if sweep.size > MAX_POINTS:
        factors = " x ".join(f"{len(values)} {name}" for name, values in lists.items())
        got = f"{sweep.size} ({factors}{f' + {len(include)} included' if include else ''})"
        raise document.refusal(("sweep",), f"at most {MAX_POINTS} points", got)
    return sweep


def _list(document: Document, name: str, value: object) -> tuple[object, ...]:
    values = document.sequence(("sweep", name), value, "values")
    seen: dict[str, int] = {}
    for position, each in enumerate(values):
        before = seen.setdefault(same(each), position)
        if before != position:
            got = f"{show(each)} again (first at [{before}])"
            raise document.refusal(("sweep", name, position), "each value once", got)
    return tuple(values)


def _entries(
    document: Document, key: str, section: Mapping[str, object], allowed: Iterable[str]
) -> tuple[Values, ...]:
    if key not in section:
        return ()
    path, allowed = ("sweep", key), tuple(allowed)
    entries = document.sequence(path, section[key], "mappings")
    for position, entry in enumerate(entries):
        if not allowed:
            raise document.refusal(path, "a swept parameter to match", "none in 'sweep'")
        if not document.mapping((*path, position), entry, allowed):
            raise document.refusal((*path, position), "at least one parameter", "an empty mapping")
    return tuple(entries)


def _check_match(
    document: Document, position: int, match: Values, lists: Mapping[str, tuple[object, ...]]
) -> None:
    for name, wanted in match.items():
        path: KeyPath = ("sweep", "exclude", position, name)
        known = {same(value) for value in lists[name]}
        if same(wanted) in known:
            continue
        expected = f"a value of 'sweep.{name}', or a list of them"
        if not isinstance(wanted, list):
            raise document.refusal(path, expected, show(wanted))
        for index, each in enumerate(document.sequence(path, wanted, "values")):
            if same(each) not in known:
                raise document.refusal((*path, index), f"a value of 'sweep.{name}'", show(each))
