"""YAML as people mean it, and the bounds on it."""

from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import document
from orchestrator.spec.job import read_job


def read(text: str) -> object:
    return document.read(text, file="x.yaml").value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("True", True), ("FALSE", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("NO", "NO"),
        ("0", 0), ("-7", -7), ("+7", 7), ("12345678901234567890", 12345678901234567890),
        ("010", "010"), ("0o17", "0o17"), ("0x1F", "0x1F"), ("0b1", "0b1"), ("1_000", "1_000"),
        ("1:30", "1:30"), ("2026-01-02", "2026-01-02"),
        ("2026-01-02 03:04:05", "2026-01-02 03:04:05"),
        ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("1e3", 1000.0), ("-1.5E-2", -0.015), ("1e", "1e"),
        (".", "."), ("-", ["x"]), (".inf", ".inf"), ("-.INF", "-.INF"), (".nan", ".nan"),
        ("NaN", "NaN"), ("Infinity", "Infinity"), ('"true"', "true"), ("'1'", "1"),
        ("=", "="), ("<<", "<<"), ("1.2.3", "1.2.3"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    source = "a:\n  - x" if text == "-" else f"a: {text}"
    found = read(source)
    assert found == {"a": value}
    assert type(found["a"]) is type(value)  # type: ignore[index]


def test_block_texts_are_texts() -> None:
    assert read("a: |\n  true\nb: >-\n  12\n") == {"a": "true\n", "b": "12"}


def test_keys_are_texts() -> None:
    assert read("{1: a, true: b, 2026-01-02: c, null: d}") == {
        "1": "a", "true": "b", "2026-01-02": "c", "null": "d",
    }  # fmt: skip


def test_lines_are_those_of_keys_and_entries() -> None:
    found = document.read("a:\n  b:\n    - 1\n    - {c: 2,\n       d: 3}\n", file="jobs/x.yaml")
    assert found.where("a", "b", 1, "d") == "jobs/x.yaml:5: a.b[1].d"
    assert found.where("a", "b", 0) == "jobs/x.yaml:3: a.b[0]"
    assert found.where("a", "b", 9, "z") == "jobs/x.yaml:2: a.b[9].z"
    assert found.where() == "jobs/x.yaml:1"


@pytest.mark.parametrize(
    "text",
    [
        '"\\ud83d"', "\ud83d", "a: \x07", "%YAML 9.9\n---\na: 1", "a: b: c", "[1", "{a: 1", "@a",
        "- 1\n- 2\n---\n- 3", "!!str a", "!x a", "? !!str a\n: 1", "&a 1", "? &a b\n: 1", "[*a]",
        "{a: 1, a: 2}", '{a: 1, "a": 2}', "a: 1e400", "a: " + "9" * 401, "[" * 33 + "]" * 33,
        "[" * 100_000, "{a: " * 100_000, "- " * 100_000, 'a: "\\0"', '"\\0": a',
    ],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_refused_and_never_worse(text: str) -> None:
    with pytest.raises(SpecError, match=r"^x\.yaml"):
        read(text)


def test_deep_as_allowed() -> None:
    read("[" * 32 + "]" * 32)


def test_too_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_VALUES", 10)
    read("[" + "1," * 9 + "]")
    with pytest.raises(SpecError, match=r"x\.yaml:1: \[9\]: expected at most 10 values"):
        read("[" + "1," * 10 + "]")


def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(document, "MAX_BYTES", 10)
    with pytest.raises(SpecError, match="at most 10 bytes"):
        read("a: " + "é" * 4)
    (tmp_path / "x.yaml").write_bytes(b"a: " + b"b" * 10_000)
    with pytest.raises(SpecError, match="at most 10 bytes"):
        read_job(tmp_path / "x.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml: expected a job's YAML file, got no such"):
        read_job(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match=r"expected a job's YAML file, got is a directory"):
        read_job(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(SpecError, match=r"x\.yaml: expected text in UTF-8"):
        read_job(tmp_path / "x.yaml")


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text = "name: a\nmodel: tiny\nparams: {messages: [{role: user, content: Hi}]}\n"
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_job(tmp_path / "x.yaml").source == text


def test_suggestion() -> None:
    assert document.suggestion("temprature", ["temperature", "top_p"]) == (
        " (did you mean 'temperature'?)"
    )
    assert document.suggestion("zebra", ["temperature"]) == ""
