"""A dataset's rows: streamed, checked, and those that were parsed."""

import itertools
import json
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import datasets
from orchestrator.spec.datasets import Dataset, rows
from orchestrator.spec.job import parse_job

TEXT = "name: a\nmodel: tiny\nparams: {messages: [{role: user, content: Hi}]}\n"


def dataset(root: Path, content: bytes) -> Dataset:
    (root / "x.jsonl").write_bytes(content)
    text = TEXT + "dataset: {path: x.jsonl}\n"
    return parse_job(text, file="jobs/x.yaml", root=root).dataset


def test_positions_are_ids_where_there_are_none(tmp_path: Path) -> None:
    found = list(rows(dataset(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}')))
    assert found == [(0, "0", {"a": 1}), (1, "1", {"a": "é"})]


def test_custom_ids(tmp_path: Path) -> None:
    content = b'{"custom_id": "b", "a": 1}\n{"custom_id": "a", "a": 2}\n'
    found = list(rows(dataset(tmp_path, content)))
    assert [(position, custom_id) for position, custom_id, _ in found] == [(0, "b"), (1, "a")]
    assert found[0][2] == {"custom_id": "b", "a": 1}


def test_inline_and_none() -> None:
    text = TEXT + "dataset: {items: [{a: 1}, {a: 2.5, b: [x, null]}]}\n"
    spec = parse_job(text, file="x.yaml", root=Path())
    assert list(rows(spec.dataset)) == [(0, "0", {"a": 1}), (1, "1", {"a": 2.5, "b": ["x", None]})]
    assert spec.dataset.to_json() == {"items": 2, "sha256": spec.dataset.sha256}
    nothing = parse_job(TEXT, file="x.yaml", root=Path()).dataset
    assert list(rows(nothing)) == [(0, "0", {})]


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b"[1]", "a list of 1"), (b"1", "1"), (b"null", "null"), (b'"x"', "'x'"),
        (b'{"a": NaN}', "NaN, which JSON has not"), (b'{"a": -Infinity}', "-Infinity, which"),
        (b'{"a": 1e999}', "a number that does not fit 64 bits (1e999)"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' twice"), (b'{"a": 1,}', "an error ("),
        (b'{"a": 1} {"a": 2}', "an error (extra data, column 10)"),
        (b'{"a": "\xff"}', "other bytes"),
        (b'{"a": "x\\u0000"}', r"'x\x00'"), (b'{"\\u0000": 1}', r"'\x00'"),
        (b'{"a": "\\udc00"}', "half a surrogate pair"),
        (b'{"\\ud800": 1}', "half a surrogate pair"),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "more"), (b'{"a": ' + b"[" * 100_000, "more"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"), (b"{'a': 1}", "an error ("),
        (b'{"custom_id": 1}', "1"), (b'{"custom_id": ""}', "''"), (b'{"custom_id": null}', "null"),
        (b'{"custom_id": "' + b"x" * 513 + b'"}', "'xxx"),
    ],
    ids=lambda value: repr(value[:20]),
)  # fmt: skip
def test_refused_with_file_and_line(tmp_path: Path, line: bytes, got: str) -> None:
    with pytest.raises(SpecError) as error:
        list(rows(dataset(tmp_path, b"\n" + line + b"\n")))
    assert error.value.where == "jobs/x.jsonl:2"
    assert error.value.got.startswith(got)


def test_long_lines_are_refused_without_being_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "MAX_LINE_BYTES", 20)
    with pytest.raises(SpecError, match=r"jobs/x\.jsonl:1: expected a line of at most 20 bytes"):
        list(rows(dataset(tmp_path, b'{"a": "' + b"x" * 100 + b'"}\n')))


def test_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_FILE_BYTES", 10)
    with pytest.raises(SpecError, match=r"dataset\.path: expected a file of at most 10 bytes"):
        dataset(tmp_path, b'{"a": 12345}\n')


def test_a_file_changed_since_is_refused(tmp_path: Path) -> None:
    found = dataset(tmp_path, b'{"a": 1}\n')
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 2}\n')
    with pytest.raises(SpecError, match=r"jobs/x\.jsonl: expected the file as it was"):
        list(rows(found))


def test_rows_are_streamed(tmp_path: Path) -> None:
    """The first rows come before a fault further down is seen."""
    lines = "".join(json.dumps({"a": number}) + "\n" for number in range(1000))
    found = rows(dataset(tmp_path, lines.encode() + b"broken\n"))
    assert [row[0] for row in itertools.islice(found, 1000)] == list(range(1000))
    with pytest.raises(SpecError, match=r"jobs/x\.jsonl:1001"):
        next(found)
