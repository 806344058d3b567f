"""A job's points, items and requests: pure, deterministic, lazy; and a request's parameters.

`plan` reads the dataset once to check and count it, and holds no item; `resolve` is what turns a
planned request into parameters, at the door and on the worker alike. Knows nothing of SQL. Plans
of whole bodies are made in `bodies.py`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from orchestrator.errors import ParameterError, SpecError
from orchestrator.spec import datasets, sweep, templates
from orchestrator.spec.job import GraderSpec, JobSpec, at_point
from orchestrator.spec.params import ChatParams, parse_params
from orchestrator.spec.patterns import pattern_fault
from orchestrator.spec.refusals import KeyPath
from orchestrator.spec.sweep import Values
from orchestrator.spec.templates import TEMPLATED, TemplateError

MAX_REQUESTS = 1_000_000
MAX_CHOICES = 10_000_000


@dataclass(frozen=True, slots=True)
class Point:
    """One cell of the sweep: its position from 0 and the parameters that it sets."""

    position: int
    params: Values


@dataclass(frozen=True, slots=True)
class Item:
    """One row of the dataset: its position from 0, custom_id (unique in the job), columns."""

    position: int
    custom_id: str
    columns: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One item at one point; `seed` is an int64, `max_tokens` counts per choice (None: open).

    `user` is the parameter of that name with its template filled.
    """

    position: int
    item: Item
    point: Point
    seed: int
    n: int
    max_tokens: int | None
    user: str | None = None


@dataclass(frozen=True)
class Plan:
    """What would run. One spec yields always the same; items and requests are made on the way."""

    spec: JobSpec
    points: tuple[Point, ...]
    n_items: int

    @property
    def verbatim(self) -> bool:
        """Each item's columns are the whole parameters of its requests, nothing a template."""
        return False

    @property
    def n_requests(self) -> int:
        return self.n_items * len(self.points)

    @cached_property
    def n_choices(self) -> int:
        return self.n_items * sum(_n(self.spec, point) for point in self.points)

    @cached_property
    def max_total_tokens(self) -> int | None:
        """The most completion tokens the job can make; None if a point has no `max_tokens`."""
        total = 0
        for point in self.points:
            max_tokens = _max_tokens(self.spec, point)
            if max_tokens is None:
                return None
            total += _n(self.spec, point) * max_tokens
        return self.n_items * total

    def items(self) -> Iterator[Item]:
        """In the dataset's order; reads it anew. Raises `SpecError` if it has changed since."""
        return (Item(*row) for row in datasets.rows(self.spec.dataset))

    def requests(self) -> Iterator[PlannedRequest]:
        """In order of position: item by item, each at every point."""
        for item in self.items():
            for point in self.points:
                position = item.position * len(self.points) + point.position
                seed = request_seed(self.spec, item.position, point)
                n, max_tokens = _n(self.spec, point), _max_tokens(self.spec, point)
                user = _user(self.spec, item, point)
                yield PlannedRequest(position, item, point, seed, n, max_tokens, user)


def _merged(spec: JobSpec, point: Point, name: str) -> object:
    return point.params[name] if name in point.params else spec.params.get(name)


def _n(spec: JobSpec, point: Point) -> int:
    n = _merged(spec, point, "n")
    return n if isinstance(n, int) else 1


def _max_tokens(spec: JobSpec, point: Point) -> int | None:
    max_tokens = _merged(spec, point, "max_tokens")
    return max_tokens if isinstance(max_tokens, int) else None


def _user(spec: JobSpec, item: Item, point: Point) -> str | None:
    user = _merged(spec, point, "user")
    return templates.render(user, item.columns) if isinstance(user, str) else None


def request_seed(spec: JobSpec, item_position: int, point: Point) -> int:
    """The request's `seed` parameter, or 63 bits of a hash of the job's seed and its place."""
    seed = _merged(spec, point, "seed")
    if isinstance(seed, int):
        return seed
    key = f"{spec.seed} {item_position} {point.position}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def given(
    params: Values, point_params: Values, columns: Mapping[str, object], *, verbatim: bool
) -> dict[str, object]:
    """A request's parameters as they were written, templates intact.

    The point's over the job's; `verbatim`: the item's columns and nothing else.
    """
    return dict(columns) if verbatim else {**params, **point_params}


def resolve(
    params: Values,
    point_params: Values,
    columns: Mapping[str, object],
    seed: int,
    *,
    verbatim: bool = False,
    vocab_size: int | None = None,
) -> ChatParams:
    """A request's own parameters: as `given`, templates rendered (none if `verbatim`), parsed.

    Pure. Raises `TemplateError` (a `RequestError`) or `ParameterError`.
    """
    merged = given(params, point_params, columns, verbatim=verbatim)
    for name in () if verbatim else TEMPLATED:
        if name in merged:
            merged[name] = templates.render_tree(merged[name], columns, (name,))
    merged["seed"] = seed
    return parse_params(merged, vocab_size=vocab_size)


def plan(spec: JobSpec) -> Plan:
    """The plan of `spec`, every item's templates rendered and every limit checked.

    Reads the dataset once, item by item. Raises `SpecError`; nothing is written anywhere.
    """
    points = tuple(
        Point(position, params) for position, (params, _) in enumerate(sweep.expand(spec.sweep))
    )
    n_items, kinds = 0, _kinds(spec)
    for item in (Item(*row) for row in datasets.rows(spec.dataset)):
        n_items += 1
        if n_items * len(points) > MAX_REQUESTS:
            got = f"{len(points)} points at each of {n_items} items or more"
            path = ("sweep",) if len(points) > 1 else ("dataset",)
            raise spec.document.refusal(path, f"at most {MAX_REQUESTS} requests", got)
        _check_item(spec, kinds, item)
    made = Plan(spec, points, n_items)
    _check_totals(made)
    return made


def _kinds(spec: JobSpec) -> tuple[tuple[Values, int | None], ...]:
    """One point for each different set of templates: the others render alike.

    Nor may the rendered messages suit one `response_format` and not another.
    """
    kinds: dict[str, tuple[Values, int | None]] = {}
    for params, included in sweep.expand(spec.sweep):
        names = (*TEMPLATED, "response_format")
        templated = {name: params[name] for name in names if name in params}
        kinds.setdefault(sweep.same(templated), (params, included))
    return tuple(kinds.values())


def _check_item(spec: JobSpec, kinds: tuple[tuple[Values, int | None], ...], item: Item) -> None:
    for point, included in kinds:
        try:
            resolve(spec.params, point, item.columns, 0)
        except TemplateError as error:
            place = sweep.origin(spec.sweep, point, included, str(error.path[0]))
            raise _template_refusal(spec, (*place, *error.path[1:]), item, error) from None
        except ParameterError as error:
            error.got += f", in {_named(spec, item)}"
            raise at_point(spec.document, error, spec.sweep, point, included) from None
    for position, grader in enumerate(spec.graders):
        try:
            _check_grader(grader, item)
        except TemplateError as error:
            path = ("graders", position, "expected")
            raise _template_refusal(spec, path, item, error) from None


def _check_grader(grader: GraderSpec, item: Item) -> None:
    text = templates.render(grader.expected, item.columns)
    if grader.type == "regex" and text is not grader.expected and (fault := pattern_fault(text)):
        raise TemplateError((), f"no regular expression: {fault}")


def _named(spec: JobSpec, item: Item) -> str:
    source = f" of {spec.dataset.path}" if spec.dataset.path else ""
    return f"item {item.position} (custom_id '{item.custom_id}'){source}"


def _template_refusal(spec: JobSpec, path: KeyPath, item: Item, error: TemplateError) -> SpecError:
    named = _named(spec, item)
    if error.column is None:
        return spec.document.refusal(
            path, "a template that every item can fill", f"{error.reason}, in {named}"
        )
    columns = ", ".join(f"'{name}'" for name in item.columns) or "none"
    got = f"columns {columns} in {named}"
    return spec.document.refusal(path, f"a column '{error.column}' in every item", got)


def _check_totals(made: Plan) -> None:
    document, limit = made.spec.document, made.spec.limits.max_total_tokens
    if made.n_choices > MAX_CHOICES:
        raise document.refusal((), f"at most {MAX_CHOICES} completions", str(made.n_choices))
    if limit is None:
        return
    path = ("limits", "max_total_tokens")
    if made.max_total_tokens is None:
        expected = "'params.max_tokens' beside it, to bound every completion"
        raise document.refusal(path, expected, "none")
    if made.max_total_tokens > limit:
        got = f"up to {made.max_total_tokens} in {made.n_choices} completions"
        raise document.refusal(path, f"a job of at most {limit} tokens", got)
