"""A dataset's rows, streamed: inline items and JSON Lines.

Checks rows for their shape, size and `custom_id`; knows nothing of templates over their columns.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NoReturn

from orchestrator.errors import SpecError
from orchestrator.spec.document import Document
from orchestrator.spec.refusals import show

MAX_FILE_BYTES = 2 * 2**30
MAX_LINE_BYTES = 2**20
MAX_DEPTH = 32
MAX_CUSTOM_ID = 512
SUFFIXES = (".jsonl", ".ndjson")

Columns = Mapping[str, object]
Row = tuple[int, str, Columns]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Where the items are: a file, inline, or (neither) the single item without columns.

    `path` is the file's name as messages show it; `sha256` tells the same bytes or items again.
    """

    path: str | None
    file: Path | None
    items: tuple[Columns, ...]
    sha256: str
    document: Document = field(repr=False, compare=False)

    def to_json(self) -> dict[str, object]:
        """The description that is stored with the job."""
        kind = {"path": self.path} if self.path else {"items": len(self.items)}
        return {**kind, "sha256": self.sha256}


def read(document: Document, value: object, root: Path) -> Dataset:
    """The file's `dataset` section; `root` is the folder that paths start from and stay in."""
    section = document.mapping(("dataset",), value, ("items", "path", "from"))
    if "from" in section:
        expected = "'path' or 'items' ('from' is not supported yet)"
        raise document.refusal(("dataset", "from"), expected, show(section["from"]))
    if len(section) != 1:
        got = "both" if section else "neither"
        raise document.refusal(("dataset",), "either 'path' or 'items'", got)
    if "path" in section:
        return _read_path(document, section["path"], root)
    items = document.sequence(("dataset", "items"), section["items"], "mappings")
    for position, item in enumerate(items):
        document.mapping(("dataset", "items", position), item)
    return inline(document, tuple(items))


def inline(document: Document, items: tuple[Columns, ...]) -> Dataset:
    text = json.dumps(items, sort_keys=True, ensure_ascii=True)
    return Dataset(None, None, items, hashlib.sha256(text.encode()).hexdigest(), document)


def _read_path(document: Document, value: object, root: Path) -> Dataset:
    where = ("dataset", "path")
    text = document.text(where, value, "the path of a JSON Lines file")
    if PurePosixPath(text).suffix.lower() not in SUFFIXES:
        expected = f"a file ending in {' or '.join(SUFFIXES)} (others are not supported yet)"
        raise document.refusal(where, expected, show(text))
    inside = "a path inside the job file's folder"
    if PurePath(text).is_absolute() or ".." in PurePath(text).parts or "\\" in text:
        raise document.refusal(where, inside, show(text))
    file = (root / text).resolve()
    if not file.is_relative_to(root.resolve()):
        raise document.refusal(where, inside, f"{show(text)}, a link that leads out of it")
    if not file.is_file():
        what = "which is no file" if file.exists() else "which does not exist"
        raise document.refusal(where, "a file", f"{show(text)}, {what}")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise document.refusal(where, f"a file of at most {MAX_FILE_BYTES} bytes", "more")
    shown = str(PurePath(document.file).parent / text)
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise document.refusal(where, "a file", f"{show(text)}: {error.strerror}") from None
    return Dataset(shown, file, (), sha256, document)


def rows(dataset: Dataset) -> Iterator[Row]:
    """Each item's (position from 0, custom_id, columns), in the file's order, one at a time.

    A row's `custom_id` is its own, or its position; all rows have their own, or none, and no two
    the same. Raises `SpecError` with the row's place, also if the file is no longer the one that
    was parsed.
    """
    seen: set[str] = set()
    named = False
    for position, (where, columns) in enumerate(_placed(dataset)):
        if position == 0:
            named = "custom_id" in columns
        if named != ("custom_id" in columns):
            expected = f"a 'custom_id' in {'every' if named else 'no'} item, as in the first"
            raise SpecError(where, expected, "none" if named else show(columns["custom_id"]))
        custom_id = _custom_id(where, columns["custom_id"]) if named else str(position)
        if named and custom_id in seen:
            raise SpecError(where, "each custom_id once", f"{show(custom_id)} again")
        if named:
            seen.add(custom_id)
        yield position, custom_id, columns


def _custom_id(where: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID:
        expected = f"a custom_id of 1 to {MAX_CUSTOM_ID} characters"
        raise SpecError(where, expected, show(value))
    return value


def _placed(dataset: Dataset) -> Iterator[tuple[str, Columns]]:
    if dataset.file:
        yield from _lines(dataset.file, str(dataset.path), dataset.sha256)
    elif dataset.items:
        for position, columns in enumerate(dataset.items):
            yield dataset.document.where("dataset", "items", position), columns
    else:
        yield dataset.document.where(), {}


def _lines(file: Path, shown: str, sha256: str) -> Iterator[tuple[str, Columns]]:
    digest, number, empty = hashlib.sha256(), 0, True
    with file.open("rb") as stream:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            digest.update(line)
            where = f"{shown}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise SpecError(where, f"a line of at most {MAX_LINE_BYTES} bytes", "more")
            if line.strip():
                empty = False
                yield where, _row(where, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b""))
    if digest.hexdigest() != sha256:
        raise SpecError(shown, "the file as it was when the job was read", "a changed one")
    if empty:
        raise SpecError(shown, "at least one item", "an empty file")


def _row(where: str, line: bytes) -> Columns:
    try:
        value = json.loads(
            line.decode().strip(),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
    except UnicodeDecodeError:
        raise SpecError(where, "text in UTF-8", "other bytes") from None
    except json.JSONDecodeError as error:
        got = f"an error ({error.msg[:1].lower()}{error.msg[1:]}, column {error.colno})"
        raise SpecError(where, "a JSON object", got) from None
    except RecursionError:
        raise SpecError(where, f"at most {MAX_DEPTH} levels", "more") from None
    except ValueError as error:
        raise SpecError(where, "a JSON object", str(error)) from None
    if not isinstance(value, dict):
        raise SpecError(where, "a JSON object", show(value))
    _check_value(where, value, 1)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {show(twice)} twice")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which JSON has not")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"a number that does not fit 64 bits ({text[:20]})")
    return value


def _check_value(where: str, value: object, depth: int) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise SpecError(where, "a text without NUL characters", show(value))
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise SpecError(where, "text in Unicode", "half a surrogate pair")
    elif isinstance(value, list | dict):
        if depth > MAX_DEPTH:
            raise SpecError(where, f"at most {MAX_DEPTH} levels", "more")
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        for each in inner:
            _check_value(where, each, depth + 1)
