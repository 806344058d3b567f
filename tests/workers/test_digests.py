"""Digests of large files: read once, read again when anything of the file has changed."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from workers.folders import digests
from workers.folders.digests import LARGE_BYTES, Digests
from workers.folders.folder import TINY, ModelFolder, file_digest


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read whole."""
    names: list[str] = []

    def read(file: Path) -> bytes:
        names.append(file.name)
        return file_digest(file)

    monkeypatch.setattr(digests, "file_digest", read)
    return names


def digest(cache: Path, file: Path) -> bytes:
    """As a new process would ask."""
    found = Digests(cache)(file)
    assert found == hashlib.sha256(file.read_bytes()).digest()
    return found


def test_a_large_file_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    for name, size in (("large", LARGE_BYTES), ("small", LARGE_BYTES - 1)):
        (tmp_path / name).write_bytes(os.urandom(size))
        digest(tmp_path / "cache", tmp_path / name)
        digest(tmp_path / "cache", tmp_path / name)
    assert reads == ["large", "small", "small"]


def test_whatever_changes_of_it_is_noticed(tmp_path: Path, reads: list[str]) -> None:
    file, other = tmp_path / "weights", tmp_path / "other"
    file.write_bytes(bytes(LARGE_BYTES))
    before = digest(tmp_path, file)
    times = file.stat()
    other.write_bytes(b"1" * LARGE_BYTES)  # of the same size, and its time set to be the same
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert digest(tmp_path, file) != before
    file.write_bytes(bytes(LARGE_BYTES + 1))
    digest(tmp_path, file)
    assert reads == ["weights"] * 3


def test_two_processes_keep_what_each_other_found(tmp_path: Path, reads: list[str]) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(LARGE_BYTES))
    one, two = Digests(tmp_path), Digests(tmp_path)
    one(tmp_path / "a")
    two(tmp_path / "b")
    reads.clear()
    third = Digests(tmp_path)
    assert third(tmp_path / "a") == third(tmp_path / "b")
    assert reads == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"FILE": [1, 2]}', '{"FILE": [1, 2, 3, "zz"]}'])
def test_a_broken_cache_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(LARGE_BYTES))
    (tmp_path / "digests.json").write_text(text.replace("FILE", str(file)))
    digest(tmp_path, file)
    assert str(file) in json.loads((tmp_path / "digests.json").read_text())


def test_a_cache_that_cannot_be_written_costs_reading(tmp_path: Path, reads: list[str]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(LARGE_BYTES))
    digest(file / "cache", file)  # a file is no folder
    digest(file / "cache", file)
    assert reads == ["weights", "weights"]


def test_a_models_digest_is_the_same_either_way(tmp_path: Path) -> None:
    folder = ModelFolder.load(TINY)
    assert folder.digest(Digests(tmp_path)) == folder.digest() == folder.digest(Digests(tmp_path))
