"""Patterns of users: what compiles, and what is refused before it costs memory."""

import re

import pytest

from orchestrator.spec.patterns import compile_pattern, pattern_fault


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("(", "missing )"),
        (r"\p{Nonsense}", "unknown property"),
        ("a{99999999999}", "more than 100000 atoms"),
        ("a{999}{999}", "more than 100000 atoms"),
        ("((a{1000}){1000}){1000}", "more than 100000 atoms"),
        ("(?:(?:[()]{999}){999,}){9}", "more than 100000 atoms"),
        ("x" * 2001, "longer than 2000"),
        ("(" * 900 + "a" + ")" * 900, "nested too deeply"),
    ],
)
def test_patterns_that_cannot_be_compiled_safely_are_refused(pattern: str, fault: str) -> None:
    assert fault in (pattern_fault(pattern) or "")
    with pytest.raises(ValueError, match=re.escape(fault)):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    "pattern", [r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(?::\d{2})?", "[({]{3}", "a{2,}", "{x}", "", r"\{9"]
)
def test_ordinary_patterns_compile(pattern: str) -> None:
    assert pattern_fault(pattern) is None
    assert compile_pattern(pattern, ignore_case=True).pattern == pattern
