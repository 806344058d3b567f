"""A job's YAML to a `JobSpec`, or one refusal with file, line, key, what was expected and got.

Reads the text and, to fingerprint it, the dataset's bytes; writes nothing. Knows nothing of
rows, of how points are numbered, or of how a grader grades.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import ParameterError, SpecError
from orchestrator.spec import datasets, document, limits, sweep, templates
from orchestrator.spec.datasets import Dataset
from orchestrator.spec.document import Document
from orchestrator.spec.limits import Limits
from orchestrator.spec.params import INT64, NAMES, parse_params
from orchestrator.spec.patterns import pattern_fault
from orchestrator.spec.refusals import KeyPath, path_of, show
from orchestrator.spec.sweep import Sweep, Values
from orchestrator.spec.templates import TEMPLATED

KEYS = (
    "name", "model", "dataset", "params", "sweep", "graders", "limits", "seed", "priority",
)  # fmt: skip
ORDERED = ("functions", "response_format", "tools")
LATER = ("jobs", "needs", "schedule")
GRADER_TYPES = ("equals", "contains", "regex")
_GRADER_KEYS = ("name", "type", "expected", "ignore_case", "strip")
_JOB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_GRADER_NAME = r"[A-Za-z0-9_-]{1,64}"
_INT32 = 2**31


@dataclass(frozen=True, slots=True)
class GraderSpec:
    """How to score a completion; `expected` is a template over the item's columns."""

    name: str
    type: str
    expected: str
    ignore_case: bool = False
    strip: bool = False


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One submitted unit of work.

    `params` are the raw parameters, templates intact, `model` among them; `seed` is the job's
    own, from which requests without one derive theirs; `digest` is equal for equal content,
    whatever the layout and comments of `source`; `document` tells places in the file.
    """

    name: str
    model: str
    dataset: Dataset
    params: Values
    sweep: Sweep
    graders: tuple[GraderSpec, ...]
    limits: Limits
    seed: int
    priority: int
    source: str = field(repr=False)
    digest: str
    document: Document = field(repr=False, compare=False)

    def to_json(self) -> dict[str, object]:
        """What is stored with the job beside its rows: plain JSON values."""
        return {
            "params": self.params,
            "sweep": asdict(self.sweep),
            "graders": [asdict(grader) for grader in self.graders],
            "limits": asdict(self.limits),
            "dataset": self.dataset.to_json(),
        }


def read_job(path: Path, *, file: str | None = None) -> JobSpec:
    """The job in the file at `path`, called `file` in messages.

    Raises `SpecError` also where the file cannot be read, or is too large to be read whole.
    """
    file = file or str(path)
    try:
        with path.open("rb") as stream:
            text = stream.read(document.MAX_BYTES + 1).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise SpecError(file, "text in UTF-8", "other bytes") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(file, "a job's YAML file", reason.lower()) from None
    return parse_job(text, file=file, root=path.parent)


def parse_job(text: str, *, file: str, root: Path) -> JobSpec:
    """The job in `text`; `file` is its name in messages, `root` its folder.

    Raises `SpecError`: `FILE:LINE: dotted.key[2]: expected ..., got ...`.
    """
    read = document.read(text, file=file)
    value = _top(read)
    params = _params(read, value)
    swept = sweep.read(read, value["sweep"]) if "sweep" in value else Sweep()
    _check_points(read, params, swept)
    graders = _graders(read, value["graders"]) if "graders" in value else ()
    bounds = limits.read(read, value["limits"]) if "limits" in value else Limits()
    seed = read.integer(("seed",), value.get("seed", 0), -INT64, INT64 - 1)
    priority = read.integer(("priority",), value.get("priority", 0), -_INT32, _INT32 - 1)
    dataset = (
        datasets.read(read, value["dataset"], root)
        if "dataset" in value
        else datasets.inline(read, ())
    )
    name, model = str(value["name"]), str(params["model"])
    content = (
        name, _ordered(params),
        [(key, [_ordered({key: value})[key] for value in values])
         for key, values in swept.lists.items()],
        [_ordered(point) for point in swept.include],
        [_ordered(match) for match in swept.exclude],
        [asdict(grader) for grader in graders], bounds.content(), seed, priority, dataset.sha256,
    )  # fmt: skip
    return JobSpec(
        name, model, dataset, params, swept, graders, bounds, seed, priority, text,
        _digest(content), read,
    )  # fmt: skip


def _ordered(params: Values) -> Values:
    """`params` with a text for what reaches the model or the answer in the order of its keys."""
    return {
        name: json.dumps(value) if name in ORDERED and value is not None else value
        for name, value in params.items()
    }


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _top(read: Document) -> dict[str, Any]:
    if not isinstance(read.value, dict):
        raise read.refusal((), "a mapping", show(read.value))
    for key in LATER:
        if key in read.value:
            raise read.refusal((key,), f"a job without '{key}' (not supported yet)", f"'{key}'")
    value = read.mapping((), read.value, KEYS)
    for key in ("name", "params"):
        if key not in value:
            raise read.refusal((), f"a key '{key}'", "none")
    expected = "1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit"
    read.text(("name",), value["name"], expected, _JOB_NAME)
    return value


def _params(read: Document, value: Mapping[str, Any]) -> Values:
    """The raw parameters with the model, which may stand at the top or among them."""
    params = read.mapping(("params",), value["params"], NAMES)
    models: list[tuple[KeyPath, object]] = []
    if "model" in value:
        models.append((("model",), value["model"]))
    if "model" in params:
        models.append((("params", "model"), params["model"]))
    if not models:
        raise read.refusal((), "a key 'model'", "none")
    for place, model in models:
        read.text(place, model, "a model's name of 1 to 200 characters", r"\S(.{0,198}\S)?")
    (_, model), (place, other) = models[0], models[-1]
    if model != other:
        raise read.refusal(place, f"the same as 'model', {show(model)}", show(other))
    return {**params, "model": model}


def _check_templates(read: Document, path: KeyPath, value: object) -> None:
    for inner, text in templates.strings(value):
        try:
            templates.check(text)
        except templates.TemplateError as error:
            got = f"one that is refused: {error.reason}"
            raise read.refusal((*path, *inner), "a template", got) from None


def _check_points(read: Document, params: Values, swept: Sweep) -> None:
    """Every point's parameters as a whole, with a plain word in place of each template."""
    for path, given in sweep.places(swept, params):
        _check_templates(read, path, {name: given[name] for name in TEMPLATED if name in given})
    base = _outlined(params)
    seen: set[str] = set()
    empty = True
    for point, included in sweep.expand(swept):
        empty = False
        try:
            parse_params(base | _outlined(point), rendered=False)
        except ParameterError as error:
            raise at_point(read, error, swept, point, included) from None
        if swept.include:
            _check_new(read, seen, {**params, **point}, included)
    if empty:
        raise read.refusal(("sweep", "exclude"), "at least one point left over", "none")


def _outlined(params: Values) -> dict[str, object]:
    return {
        name: templates.outline(value) if name in TEMPLATED else value
        for name, value in params.items()
    }


def at_point(
    read: Document, error: ParameterError, swept: Sweep, point: Values, included: int | None
) -> SpecError:
    """The error with the place in the file that the parameter at this point comes from."""
    path = error.path or path_of(error.param or "")
    place = (*sweep.origin(swept, point, included, str(path[0])), *path[1:])
    if error.code == "missing_required_parameter":
        place = place[:-1]
    return read.refusal(place, error.expected, error.got)


def _check_new(read: Document, seen: set[str], merged: Values, included: int | None) -> None:
    given = {name: value for name, value in merged.items() if value is not None}
    given.pop("messages", None)
    key = sweep.same(given)
    if key in seen:
        place: KeyPath = ("sweep", "include", included or 0)
        raise read.refusal(place, "a point the sweep does not have yet", "the same point again")
    seen.add(key)


def _graders(read: Document, value: object) -> tuple[GraderSpec, ...]:
    graders: list[GraderSpec] = []
    for position, raw in enumerate(read.sequence(("graders",), value, "mappings")):
        path: KeyPath = ("graders", position)
        grader = _grader(read, path, read.mapping(path, raw, _GRADER_KEYS))
        if grader.name in [other.name for other in graders]:
            raise read.refusal((*path, "name"), "each name once", f"{show(grader.name)} again")
        graders.append(grader)
    return tuple(graders)


def _grader(read: Document, path: KeyPath, raw: Mapping[str, object]) -> GraderSpec:
    for key in ("name", "type", "expected"):
        if key not in raw:
            raise read.refusal(path, f"a key '{key}'", "none")
    expected = "1 to 64 letters, digits, '_' or '-'"
    name = read.text((*path, "name"), raw["name"], expected, _GRADER_NAME)
    kinds = ", ".join(GRADER_TYPES)
    kind = read.text((*path, "type"), raw["type"], f"one of {kinds}", "|".join(GRADER_TYPES))
    text = read.text((*path, "expected"), raw["expected"], "a text (in quotes)", ".*")
    _check_templates(read, (*path, "expected"), text)
    if kind == "regex" and not templates.is_template(text) and (fault := pattern_fault(text)):
        got = f"{show(text)}: {fault}"
        raise read.refusal((*path, "expected"), "a regular expression", got)
    flags = {
        key: read.boolean((*path, key), raw.get(key, False)) for key in ("ignore_case", "strip")
    }
    return GraderSpec(name, kind, text, **flags)
