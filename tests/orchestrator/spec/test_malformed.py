"""Each file in malformed/ opens with the exact message it is refused with, as a comment."""

import shutil
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.job import parse_job
from orchestrator.spec.plan import plan

FOLDER = Path(__file__).parent / "malformed"
FILES = sorted(FOLDER.glob("*.yaml"))


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_there_are_many() -> None:
    assert len(FILES) >= 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_is_refused_with_its_message_and_nothing_is_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jobs"
    shutil.copytree(FOLDER, folder)
    monkeypatch.chdir(tmp_path)
    before = _state(tmp_path)
    text = (folder / file.name).read_text(encoding="utf-8")

    with pytest.raises(SpecError) as refused:
        plan(parse_job(text, file=file.name, root=folder))

    assert str(refused.value) == text.splitlines()[0].removeprefix("# ")
    assert refused.value.where
    assert refused.value.expected
    assert refused.value.got
    assert _state(tmp_path) == before
