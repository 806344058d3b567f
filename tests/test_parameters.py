"""docs/parameters.md has a row for every parameter, and every row names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from orchestrator.spec.params import NAMES, NULLABLE

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "parameters.md").read_text(encoding="utf-8")
ID = re.compile(r"`([\w/]+\.py)::(\w+)`")


def table() -> dict[str, list[str]]:
    """Parameter → the other cells of its row."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0].strip("`"): row[1:] for row in rows}


@cache
def functions(file: str) -> dict[str, str]:
    """The tests in a file under tests/ and their source."""
    text = (TESTS / file).read_text(encoding="utf-8")
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(text, node) or "" for node in found}


@cache
def words(file: str) -> set[str]:
    """Every name, text and keyword in a file: what its tests can be about."""
    return set(re.findall(r"\w+", (TESTS / file).read_text(encoding="utf-8")))


def test_each_parameter_has_one_row() -> None:
    assert sorted(table()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_its_row_is_whole_and_its_tests_exist(name: str) -> None:
    works, checked, unlike = table()[name]
    assert works
    assert unlike
    named = ID.findall(checked)
    assert named, f"{name} has no test"
    assert ID.sub("", checked).strip() == ""
    for file, test in named:
        assert test.startswith("test_")
        assert test in functions(file), f"{file} has no {test}"
    assert any(name in words(file) for file, _ in named), f"no test of {name} mentions it"


def test_the_tests_named_elsewhere_on_the_page_exist() -> None:
    for file, test in ID.findall(PAGE):
        assert test in functions(file)


def test_each_parameter_changes_a_real_answer() -> None:
    """The row of each names a test that runs it through a job, from the YAML to the export."""
    for name, (_, checked, _) in table().items():
        assert "end_to_end/test_every_parameter.py::" in checked, name


def test_the_page_names_what_may_be_null() -> None:
    (sentence,) = re.findall(r"`null` counts as not given for (.*?); elsewhere", PAGE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == NULLABLE
