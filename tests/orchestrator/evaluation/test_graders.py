"""Completions to scores: each kind, its options, its templates, and patterns that would hang."""

import json
import time

import pytest

from orchestrator.evaluation import graders
from orchestrator.evaluation.graders import grade
from orchestrator.spec.job import GraderSpec

SUM = {"a": 12, "b": 34, "sum": 46}
EXPECTED = "{{ a }} + {{ b }} = {{ sum }}"


def grader(type: str, expected: str, **options: bool) -> GraderSpec:
    return GraderSpec("g", type, expected, **{"strip": True, "ignore_case": False, **options})


@pytest.mark.parametrize(
    ("spec", "text", "score"),
    [
        (grader("equals", EXPECTED), "12 + 34 = 46", 1),
        (grader("equals", EXPECTED), " 12 + 34 = 46\n", 1),
        (grader("equals", EXPECTED, strip=False), "12 + 34 = 46\n", 0),
        (grader("equals", EXPECTED), "12 + 34 = 47", 0),
        (grader("equals", "STRASSE", ignore_case=True), "Straße", 1),
        (grader("equals", "Paris"), "paris", 0),
        (grader("equals", ""), "", 1),
        (grader("contains", "{{ sum }}"), "It is 46.", 1),
        (grader("contains", "{{ sum }}"), "It is 45.", 0),
        (grader("contains", "PARIS", ignore_case=True), "in paris", 1),
        (grader("regex", r"= *{{ sum }}\b"), "12 + 34 =   46", 1),
        (grader("regex", r"= *{{ sum }}\b"), "12 + 34 = 461", 0),
        (grader("regex", "^paris$", ignore_case=True), "PARIS", 1),
        (grader("regex", r"(?<== )\d+"), "12 + 34 = 46", 1),
    ],
)
def test_scores(spec: GraderSpec, text: str, score: float) -> None:
    assert grade(spec, text, SUM).score == score


def test_the_detail_says_what_was_expected_or_what_was_found() -> None:
    assert grade(grader("equals", EXPECTED), "12 + 34 = 46", SUM).detail is None
    wrong = grade(grader("equals", EXPECTED), "46", SUM).detail
    assert wrong is not None and json.loads(wrong) == {"expected": "12 + 34 = 46"}
    found = grade(grader("regex", r"\d+$"), "12 + 34 = 46", SUM).detail
    assert found is not None and json.loads(found) == {"match": "46"}


def test_a_detail_is_short_ascii_whatever_the_text_holds() -> None:
    text = "\0\ud83d é" * 1000
    detail = grade(grader("regex", "(?s).+"), text, {}).detail
    assert detail is not None and detail.isascii() and "\0" not in detail
    assert len(json.loads(detail)["match"]) == graders.MAX_DETAIL + 1


@pytest.mark.parametrize("pattern", [r"(\w+\s?)*$", r"(?:(?:a{1,9}){1,9}){1,9}(?:(?:a+)+)+b"])
def test_a_catastrophic_pattern_is_out_of_time_and_scores_zero(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graders, "PATTERN_SECONDS", 0.2)
    began = time.monotonic()
    score = grade(grader("regex", pattern), "aaa " * 3000 + "a" * 3000 + "!", {})
    assert time.monotonic() - began < 10
    assert score.score == 0
    assert (
        score.detail is not None and "no result within 0.2 s" in json.loads(score.detail)["error"]
    )


def test_what_slips_past_the_door_is_a_zero_with_its_reason_and_stops_nobody() -> None:
    for spec in (grader("regex", "("), grader("equals", "{{ missing }}")):
        score = grade(spec, "text", {})
        assert score.score == 0
        assert score.detail is not None and json.loads(score.detail)["error"]
