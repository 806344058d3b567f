"""A completion to a score: the kinds equals, contains and regex.

Pure: knows nothing of SQL, of jobs or of where a text came from. A grader was checked at the door
with every item (`orchestrator.spec.plan`); whatever cannot be graded all the same, a pattern that
is out of time above all, scores 0 and its detail says why: one text stops no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import RequestError
from orchestrator.spec.job import GraderSpec
from orchestrator.spec.patterns import compile_pattern
from orchestrator.spec.templates import render

PATTERN_SECONDS = 1.0
MAX_DETAIL = 200


@dataclass(frozen=True, slots=True)
class Score:
    """1.0 or 0.0; `detail` is a JSON object as text (ASCII), or None where there is none to give.

    Its keys: `expected` of a text that failed, `match` of a pattern that was found, `error`.
    """

    score: float
    detail: str | None = None


def grade(grader: GraderSpec, text: str, columns: Mapping[str, object]) -> Score:
    """The score of one choice's text; `columns` are the item's, for a templated `expected`."""
    try:
        expected = render(grader.expected, columns)
        if grader.type == "regex":
            return _grade_regex(grader, text, expected)
    except (RequestError, ValueError) as error:
        return Score(0.0, _detail(error=str(error)))
    found, wanted = _plain(grader, text), _plain(grader, expected)
    correct = found == wanted if grader.type == "equals" else wanted in found
    return Score(1.0) if correct else Score(0.0, _detail(expected=expected))


def _grade_regex(grader: GraderSpec, text: str, expected: str) -> Score:
    text = text.strip() if grader.strip else text
    pattern = compile_pattern(expected, ignore_case=grader.ignore_case)
    try:
        match = pattern.search(text, timeout=PATTERN_SECONDS)
    except TimeoutError:
        return Score(0.0, _detail(error=f"no result within {PATTERN_SECONDS:g} s of search"))
    if match is None:
        return Score(0.0, _detail(expected=expected))
    return Score(1.0, _detail(match=match.group()))


def _plain(grader: GraderSpec, text: str) -> str:
    text = text.strip() if grader.strip else text
    return text.casefold() if grader.ignore_case else text


def _detail(**fields: str) -> str:
    """ASCII JSON, so that no text (NUL, half of a surrogate pair) is refused by a database."""
    return json.dumps({key: _clip(value) for key, value in fields.items()})


def _clip(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[:MAX_DETAIL] + "…"
