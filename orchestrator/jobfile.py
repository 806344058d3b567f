"""A job's file, by its path or by the name of a bundled one, to its plan; a plan to JSON values.

Knows where the bundled jobs lie, in a checkout and inside the wheel; nothing of devices or SQL.
"""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.spec.chunks import Json
from orchestrator.spec.job import read_job
from orchestrator.spec.plan import Plan, plan, resolve

SHOWN_EXAMPLES = 2


def read_plan(file: str) -> Plan:
    """The plan of a file, or of the bundled job of that name. Raises SpecError."""
    path = Path(file)
    if not os.path.exists(file):  # unlike Path.exists never an error, however long the name
        path = _bundled(file) or path
    shown = file if path == Path(file) else path.name
    return plan(read_job(path, file=shown))


def describe(made: Plan, *, context: int | None) -> Json:
    """The plan as plain JSON values, with the first messages rendered at the first point.

    `max_total_tokens` bounds the completion tokens: by `max_tokens`, else by the model's
    `context`; null if neither is known.
    """
    bound = made.max_total_tokens
    if bound is None and context is not None:
        bound = made.n_choices * context
    return {
        "name": made.spec.name,
        "model": made.spec.model,
        "n_items": made.n_items,
        "n_points": len(made.points),
        "n_requests": made.n_requests,
        "n_choices": made.n_choices,
        "max_total_tokens": bound,
        "points": [{"position": p.position, "params": dict(p.params)} for p in made.points],
        "examples": _examples(made),
    }


def _examples(made: Plan) -> list[Json]:
    examples = []
    for item, _ in zip(made.items(), range(SHOWN_EXAMPLES), strict=False):
        params = resolve(made.spec.params, made.points[0].params, item.columns, 0)
        examples.append({"custom_id": item.custom_id, "messages": list(params.messages)})
    return examples


def _bundled(name: str) -> Path | None:
    package = Path(__file__).parent
    for folder in (package / "_jobs", package.parent / "jobs"):
        for path in sorted(folder.glob("*.yaml")):
            if path.stem == name:
                return path
    return None
