"""A plan whose requests come with their whole parameters: the lines of a batch, one chat.

Nothing in them is a template, and each has one point without parameters of its own. The lines are
read once to count them and once to write them, and never held. Knows nothing of files, HTTP or
SQL; whoever hands the lines in has checked them with `parse_params`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from orchestrator.errors import SpecError
from orchestrator.spec.datasets import Dataset
from orchestrator.spec.document import Document
from orchestrator.spec.job import JobSpec
from orchestrator.spec.limits import MAX_ATTEMPTS, Limits
from orchestrator.spec.plan import (
    MAX_CHOICES,
    MAX_REQUESTS,
    Item,
    Plan,
    PlannedRequest,
    Point,
    request_seed,
)
from orchestrator.spec.sweep import Sweep

Line = tuple[str, Mapping[str, object]]
"""(custom_id, body)."""
METADATA = "metadata"
Lines = Sequence[Line] | Callable[[], Iterator[Line]]
_POINT = Point(0, {})


@dataclass(frozen=True, slots=True)
class _Counted:
    """What one reading of the lines tells; `max_total_tokens` is None where one is unbounded."""

    lines: int
    choices: int
    max_total_tokens: int | None
    sha256: str


@dataclass(frozen=True)
class BodiesPlan(Plan):
    """What would run; each item's columns are all parameters of its request, word for word."""

    lines: Lines = field(default=(), repr=False)
    counted: _Counted = field(default=_Counted(0, 0, 0, ""), repr=False)

    @property
    def verbatim(self) -> bool:
        return True

    @cached_property
    def n_choices(self) -> int:
        return self.counted.choices

    @cached_property
    def max_total_tokens(self) -> int | None:
        return self.counted.max_total_tokens

    def items(self) -> Iterator[Item]:
        """In the lines' order; reads them anew. Raises `SpecError` if they have changed since."""
        digest = hashlib.sha256()
        for position, (custom_id, body) in enumerate(_read(self.lines)):
            _add(digest, custom_id, body)
            yield Item(position, custom_id, body)
        if digest.hexdigest() != self.counted.sha256:
            raise SpecError(_place(self.spec), "the lines as they were when counted", "others")

    def requests(self) -> Iterator[PlannedRequest]:
        """In order of position: one for each item."""
        for item in self.items():
            body, user = item.columns, item.columns.get("user")
            yield PlannedRequest(
                item.position,
                item,
                _POINT,
                _seed(self.spec, item),
                _n(body),
                _max_tokens(body),
                user if isinstance(user, str) else None,
            )


def plan_bodies(
    name: str,
    model: str,
    lines: Lines,
    *,
    priority: int = 0,
    seed: int = 0,
    source: str = "",
    max_attempts: int = MAX_ATTEMPTS,
    deadline_at: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> BodiesPlan:
    """The plan of `lines`: (custom_id, body) each, or what gives them anew whenever it is called.

    A request without a seed of its own gets one from `seed` and its position. `source`: what the
    lines came from, for messages. `deadline_at`: an instant, ISO 8601 with its zone. `metadata`:
    kept among the job's parameters, of which its requests take none. The digest is
    equal for equal lines in the same order. Raises SpecError for no lines or too many.
    """
    counted = _count(source or name, lines)
    document = Document(source or name, {}, {})
    held = () if callable(lines) else tuple(body for _, body in lines)
    spec = JobSpec(
        name=name,
        model=model,
        dataset=Dataset(None if held else source or name, None, held, counted.sha256, document),
        params={"model": model} if metadata is None else {"model": model, METADATA: dict(metadata)},
        sweep=Sweep(),
        graders=(),
        limits=Limits(max_attempts=max_attempts, deadline_at=deadline_at),
        seed=seed,
        priority=priority,
        source=source,
        digest=_digest(model, counted),
        document=document,
    )
    return BodiesPlan(spec, (_POINT,), counted.lines, lines, counted)


def _read(lines: Lines) -> Iterator[Line]:
    return iter(lines() if callable(lines) else lines)


def _count(where: str, lines: Lines) -> _Counted:
    digest, count, choices = hashlib.sha256(), 0, 0
    tokens: int | None = 0
    for custom_id, body in _read(lines):
        _add(digest, custom_id, body)
        count, choices = count + 1, choices + _n(body)
        most = _max_tokens(body)
        tokens = None if tokens is None or most is None else tokens + _n(body) * most
        if count > MAX_REQUESTS:
            raise SpecError(where, f"at most {MAX_REQUESTS} requests", "more")
        if choices > MAX_CHOICES:
            raise SpecError(where, f"at most {MAX_CHOICES} completions", "more")
    if not count:
        raise SpecError(where, "at least one request", "none")
    return _Counted(count, choices, tokens, digest.hexdigest())


def _add(digest: "hashlib._Hash", custom_id: str, body: Mapping[str, object]) -> None:
    # Keys in their order: the order of a tool's keys reaches the model.
    digest.update(json.dumps((custom_id, body)).encode())


def _digest(model: str, counted: _Counted) -> str:
    return hashlib.sha256(json.dumps((model, counted.sha256)).encode()).hexdigest()


def _place(spec: JobSpec) -> str:
    return spec.document.file


def _seed(spec: JobSpec, item: Item) -> int:
    seed = item.columns.get("seed")
    return seed if isinstance(seed, int) else request_seed(spec, item.position, _POINT)


def _n(body: Mapping[str, object]) -> int:
    n = body.get("n")
    return n if isinstance(n, int) else 1


def _max_tokens(body: Mapping[str, object]) -> int | None:
    max_tokens = body.get("max_tokens")
    return max_tokens if isinstance(max_tokens, int) else None
