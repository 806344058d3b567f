"""What is chosen, and that what was chosen once is kept: on the real graph of the tiny model."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from workers.folders.folder import TINY, ModelFolder
from workers.folders.prepare import prepare
from workers.measuring import calibration
from workers.measuring.calibration import (
    DEFAULT_CHUNK,
    DEFAULT_SLOTS,
    Calibration,
    calibrate,
    enough,
    is_better,
)
from workers.running.machine import Machine, this_machine

FOLDER = ModelFolder.load(TINY)


class Sessions:
    """Opens sessions and remembers with what; it may be told to fail."""

    def __init__(self) -> None:
        self.opened: list[tuple[int, bool]] = []
        self.error: Exception | None = None

    def __call__(self, graph: bytes, threads: int, spinning: bool) -> Any:
        if self.error is not None:
            raise self.error
        self.opened.append((threads, spinning))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(TINY)
        )
        spin = "1" if spinning else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", spin)
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return prepare(TINY, tmp_path)


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiny model is measured as if it were not too small; in a moment."""
    monkeypatch.setattr(calibration, "SMALL_BYTES", 0)
    monkeypatch.setattr(calibration, "_SECONDS", dict.fromkeys(calibration._SECONDS, 0.0))
    monkeypatch.setattr(calibration, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(calibration, "BUSY", 1.0)
    monkeypatch.setattr(calibration, "_ROWS", (1, 4, 16))
    monkeypatch.setattr(calibration, "_PROMPTS", (16, 32))
    yield


def run(graph: Path, sessions: Sessions, cache: Path, **options: Any) -> Calibration:
    return calibrate(FOLDER, graph, sessions, cache_dir=cache, **options)


def kept_files(cache: Path) -> list[Path]:
    return sorted((cache / "calibration").iterdir())


# --- keeping --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worth_it")
def test_measured_once_and_kept(graph: Path, sessions: Sessions, tmp_path: Path) -> None:
    first = run(graph, sessions, tmp_path)
    assert first.source == "measured"
    assert 1 <= first.threads <= this_machine().cores
    assert first.slots in calibration._ROWS
    assert first.chunk in calibration._PROMPTS
    assert json.loads(kept_files(tmp_path)[0].read_text()) == asdict(first)
    sessions.error = AssertionError("measured again")
    assert run(graph, sessions, tmp_path) == replace(first, source="kept")


@pytest.mark.usefixtures("worth_it")
def test_renewed_when_asked(graph: Path, sessions: Sessions, tmp_path: Path) -> None:
    run(graph, sessions, tmp_path)
    before = len(sessions.opened)
    assert run(graph, sessions, tmp_path, renew=True).source == "measured"
    assert len(sessions.opened) > before
    assert len(kept_files(tmp_path)) == 1


CHANGES = (
    {"cpu": "another"},
    {"cores": 3},
    {"threads": 3},
    {"runtime": "0.0.1"},
)


@pytest.mark.usefixtures("worth_it")
@pytest.mark.parametrize("change", CHANGES, ids=lambda each: next(iter(each)))
def test_another_machine_or_runtime_is_another_calibration(
    change: dict[str, Any],
    graph: Path,
    sessions: Sessions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(graph, sessions, tmp_path)
    other: Machine = replace(this_machine(), **change)
    monkeypatch.setattr(calibration, "this_machine", lambda: other)
    sessions.opened.clear()
    assert run(graph, sessions, tmp_path).source == "measured"
    assert sessions.opened
    assert len(kept_files(tmp_path)) == 2


@pytest.mark.usefixtures("worth_it")
def test_another_graph_is_another_calibration(
    graph: Path, sessions: Sessions, tmp_path: Path
) -> None:
    run(graph, sessions, tmp_path)
    other = tmp_path / "other.onnx"
    other.write_bytes(graph.read_bytes() + b"\x72\x00")  # an empty field more
    assert run(other, sessions, tmp_path).source == "measured"
    assert len(kept_files(tmp_path)) == 2


BROKEN = (
    "",
    "{",
    "[]",
    "null",
    '{"threads": 2}',
    '{"threads": 0, "spinning": true, "slots": 8, "chunk": 64, "source": "measured"}',
    '{"threads": "2", "spinning": true, "slots": 8, "chunk": 64, "source": "measured"}',
    '{"threads": true, "spinning": true, "slots": 8, "chunk": 64, "source": "measured"}',
    '{"threads": 2, "spinning": 1, "slots": 8, "chunk": 64, "source": "measured"}',
    '{"threads": 2, "spinning": true, "slots": 8.5, "chunk": 64, "source": "measured"}',
    '{"threads": 2, "spinning": true, "slots": 8, "chunk": 64, "source": "measured", "x": 1}',
    "\x00\xff",
)


@pytest.mark.usefixtures("worth_it")
@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_measured_anew_and_replaced(
    text: str, graph: Path, sessions: Sessions, tmp_path: Path
) -> None:
    first = run(graph, sessions, tmp_path)
    (file,) = kept_files(tmp_path)
    file.write_text(text, encoding="latin-1")
    assert run(graph, sessions, tmp_path).source == "measured"
    assert kept_files(tmp_path) == [file]
    assert run(graph, sessions, tmp_path).source == "kept"
    assert first.source == "measured"


@pytest.mark.usefixtures("worth_it")
def test_where_nothing_can_be_kept_the_default_is_taken(
    graph: Path, sessions: Sessions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where the folder should be: root may write into read-only folders."""
    cache = tmp_path / "cache"
    cache.write_text("")
    with caplog.at_level(logging.WARNING):
        found = run(graph, sessions, cache)
    assert found.source == "default"
    assert (found.threads, found.slots) == (this_machine().threads, DEFAULT_SLOTS)
    assert "calibration.not_kept" in caplog.text


# --- when nothing is measured ---------------------------------------------------------------------


def test_a_small_model_is_not_worth_it(graph: Path, sessions: Sessions, tmp_path: Path) -> None:
    found = run(graph, sessions, tmp_path)
    assert found.source == "default"
    assert not sessions.opened
    assert not (tmp_path / "calibration").exists()


@pytest.mark.usefixtures("worth_it")
def test_what_is_given_is_taken(graph: Path, sessions: Sessions, tmp_path: Path) -> None:
    both = run(graph, sessions, tmp_path, threads=3, slots=5)
    assert (both.threads, both.slots, sessions.opened) == (3, 5, [])
    threads = run(graph, sessions, tmp_path, threads=1)
    assert threads.threads == 1
    assert {each for each, _ in sessions.opened} == {1}
    slots = run(graph, sessions, tmp_path, slots=5)
    assert slots.slots == 5
    assert run(graph, sessions, tmp_path).slots in calibration._ROWS


@pytest.mark.usefixtures("worth_it")
def test_a_device_and_a_graph_that_cannot_run_have_defaults(
    graph: Path, sessions: Sessions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(graph, sessions, tmp_path, device="cuda:0").source == "default"
    assert not sessions.opened
    sessions.error = RuntimeError("no such operator")
    assert run(graph, sessions, tmp_path).source == "default"
    assert "calibration.failed" in caplog.text
    assert not (tmp_path / "calibration").exists()


# --- choosing -------------------------------------------------------------------------------------

SLOW, FAST = [10.0, 11.0, 12.0], [5.0, 5.5, 6.0]


@pytest.mark.parametrize(
    ("champion", "challenger", "better"),
    [
        ([SLOW, SLOW], [FAST, FAST], True),
        ([FAST, FAST], [SLOW, SLOW], False),
        ([SLOW, SLOW], [SLOW, SLOW], False),
        ([SLOW, FAST], [FAST, SLOW], False),  # what one work gains the other loses
        ([[10.0, 10.0]], [[9.6, 9.6]], False),  # by 4 %
        ([[10.0, 10.0]], [[9.4, 9.4]], True),  # by 6 %
        ([[9.0, 10.0, 11.0]], [[9.0, 9.0, 9.1]], False),  # in medians only
        ([[5.0, 10.0, 10.0]], [[4.0, 10.0, 10.0]], False),  # in minima only
    ],
)
def test_the_plain_choice_stands_unless_another_is_clearly_better(
    champion: list[list[float]], challenger: list[list[float]], better: bool
) -> None:
    assert is_better(champion, challenger) is better


@pytest.mark.usefixtures("worth_it")
def test_the_better_choice_is_taken(
    graph: Path, sessions: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_numbers", lambda machine: [machine.threads, 1])
    monkeypatch.setattr(calibration, "is_better", lambda champion, challenger: True)
    monkeypatch.setattr(calibration.Others, "share", lambda self: 0.0)
    found = run(graph, sessions, tmp_path)
    assert (found.threads, found.spinning, found.source) == (1, True, "measured")


@pytest.mark.usefixtures("worth_it")
def test_nothing_is_chosen_while_others_use_the_processors(
    graph: Path,
    sessions: Sessions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the default is kept: it must not change when they have gone, until somebody asks."""
    monkeypatch.setattr(calibration, "is_better", lambda champion, challenger: True)
    monkeypatch.setattr(calibration, "BUSY", 0.25)
    monkeypatch.setattr(calibration.Others, "share", lambda self: 0.9)
    busy = run(graph, sessions, tmp_path, slots=5)
    plain = Calibration(this_machine().threads, True, DEFAULT_SLOTS, DEFAULT_CHUNK, "busy")
    assert busy == replace(plain, slots=5)
    assert "calibration.busy others=90%" in caplog.text
    monkeypatch.setattr(calibration.Others, "share", lambda self: 0.0)
    assert run(graph, sessions, tmp_path) == plain
    assert run(graph, sessions, tmp_path, renew=True).source == "measured"


@pytest.mark.parametrize(
    ("rates", "size"),
    [
        ({1: 10.0}, 1),
        ({1: 10.0, 2: 20.0, 4: 40.0}, 4),
        ({1: 10.0, 8: 60.0, 16: 95.0, 32: 100.0, 64: 99.0}, 16),
        ({1: 100.0, 8: 100.0, 16: 50.0}, 1),
    ],
)
def test_the_smallest_size_at_nearly_the_best_rate(rates: dict[int, float], size: int) -> None:
    assert enough(rates) == size


def test_a_size_that_was_disturbed_is_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 2: 9.0, 4: 1.5}
    rates = calibration._rates(lambda size: seconds[size], (1, 2, 4), 0.0)
    assert rates == {1: 1.0, 2: 2 / 1.5, 4: 4 / 1.5}


def test_the_numbers_of_threads_that_are_tried() -> None:
    machine = replace(this_machine(), cores=16, threads=8)
    assert calibration._numbers(machine) == [8, 16, 4, 2]
    assert calibration._numbers(replace(machine, cores=1, threads=1)) == [1]
