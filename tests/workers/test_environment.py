"""The builder's environment is made once, whole, and by one at a time; a program ends with us."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.errors import WorkerError
from tests.workers.builder_stand_in import wheel
from workers.building import environment
from workers.building.environment import builder_python
from workers.building.program import Failed, run

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list that needs no network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    file = tmp_path / "requirements.txt"
    file.write_text(f"# one package, from a file\n{wheel(tmp_path)}\n")
    return file


def imports(python: Path) -> bool:
    return subprocess.run([python, "-c", "import onnxruntime_genai"], check=False).returncode == 0


def test_two_at_once_make_one_environment_and_later_ones_find_it(
    tmp_path: Path, requirements: Path
) -> None:
    cache, told, pythons = tmp_path / "cache", list[str](), list[Path]()

    def make() -> None:
        pythons.append(builder_python(cache, told.append, requirements))

    both = [threading.Thread(target=make) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert len(set(pythons)) == 1 and imports(pythons[0])
    assert sum("making the builder's environment" in line for line in told) == 1
    assert sum("waiting for it" in line for line in told) == 1
    told.clear()
    make()
    assert told == [] and pythons[2] == pythons[0]


def test_a_half_made_one_is_made_anew(tmp_path: Path, requirements: Path) -> None:
    cache = tmp_path / "cache"
    python = builder_python(cache, lambda line: None, requirements)
    place = python.parents[1]
    (place / "made").unlink()
    package = next(place.glob("lib/*/site-packages/onnxruntime_genai"))
    (package / "__init__.py").write_text("raise ImportError('half')")
    assert not imports(python)
    assert builder_python(cache, lambda line: None, requirements) == python and imports(python)


def test_other_requirements_make_another(tmp_path: Path, requirements: Path) -> None:
    one = builder_python(tmp_path / "cache", lambda line: None, requirements)
    requirements.write_text("# none\n")
    assert builder_python(tmp_path / "cache", lambda line: None, requirements) != one


def test_what_cannot_be_installed_is_told_with_the_way_out(
    tmp_path: Path, requirements: Path
) -> None:
    requirements.write_text("no-such-package-here==1\n")
    with pytest.raises(WorkerError) as error:
        builder_python(tmp_path / "cache", lambda line: None, requirements)
    assert error.value.code == "builder"
    assert "no-such-package-here" in str(error.value) and "--builder-python" in str(error.value)
    assert not list((tmp_path / "cache").glob("builder/*/made"))


def test_no_room_is_told_before_anything_is_made(
    tmp_path: Path, requirements: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "NEEDED_BYTES", 2**62)
    with pytest.raises(WorkerError, match="PENSTOCK_CACHE_DIR"):
        builder_python(tmp_path / "cache", lambda line: None, requirements)
    assert not list((tmp_path / "cache/builder").glob("*/bin"))


def test_the_shipped_list_is_pinned_and_whole() -> None:
    lines = environment.REQUIREMENTS.read_text().splitlines()
    names = [line.partition("==") for line in lines if not line.startswith("#")]
    assert all(version for _, _, version in names)
    assert {"onnxruntime-genai", "torch", "transformers"} <= {name for name, _, _ in names}


def test_a_program_is_heard_line_by_line_and_its_failure_keeps_the_last() -> None:
    told: list[str] = []
    run([sys.executable, "-c", "print('a'); print('b\\rc')"], told.append)
    assert told == ["a", "b", "c"]
    with pytest.raises(Failed) as failed:
        run([sys.executable, "-c", "print('a'); raise SystemExit('why')"], told.append)
    assert failed.value.code == 1 and failed.value.lines == ["a", "why"]


def test_our_own_paths_do_not_lead_the_program_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    told: list[str] = []
    run([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"], told.append)
    assert told == ["None"]


def test_whoever_stops_listening_ends_the_program(tmp_path: Path) -> None:
    began = tmp_path / "began"
    begin = f"import os, time; open({str(began)!r}, 'w').write(str(os.getpid()))"
    code = f"{begin}; print(1); time.sleep(600)"

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", code], interrupt)
    assert not Path(f"/proc/{began.read_text()}").exists()
