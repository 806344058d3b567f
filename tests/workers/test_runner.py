"""What onnxruntime says when memory is short, fewer slots after that, and at loading."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from orchestrator.errors import WorkerError
from orchestrator.settings import Settings
from workers.folders.folder import TINY, ModelFolder
from workers.loading import model as models
from workers.loading.model import LoadedModel
from workers.measuring.calibration import Calibration
from workers.running import host
from workers.running.runner import Runner
from workers.running.sizing import Sizing, Wishes, on_host, weights_bytes

PROMPT = [5, 9, 23, 40]


@pytest.fixture
def runner() -> Runner:
    return Runner(TINY, slots=4, max_length=64, threads=1)


def test_fewer_slots_compute_the_same(runner: Runner) -> None:
    def two_steps() -> list[np.ndarray[Any, Any]]:
        return [runner.prefill(0, PROMPT), runner.decode([7], [len(PROMPT)]).copy()]

    before = two_steps()
    runner.resize(2)
    assert runner.slots == 2
    for old, new in zip(before, two_steps(), strict=True):
        assert np.array_equal(old, new)
    with pytest.raises((IndexError, ValueError)):
        runner.decode([7, 7, 7], [0, 0, 0])


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (RuntimeError("bfc_arena.cc: Failed to allocate memory for requested buffer"), "memory"),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), "memory"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "runtime"),
        (RuntimeError("Non-zero status code returned while running GatherND node"), "runtime"),
    ],
)
def test_what_the_runtime_raises_is_the_machines_fault(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, said: Exception, code: str
) -> None:
    class Session:
        def run_with_iobinding(self, *_: object) -> None:
            raise said

    monkeypatch.setattr(runner, "_decode_binding", lambda batch: None)
    monkeypatch.setattr(runner.place, "session", Session())
    with pytest.raises(WorkerError) as caught:
        runner.decode([7], [0])
    assert caught.value.code == code


def test_a_model_that_does_not_fit_is_loaded_with_half_the_slots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(threads=1, cache_dir=tmp_path)
    tried: list[int] = []
    allot = Runner.allot

    def small(runner: Runner, sizing: Sizing) -> None:
        tried.append(sizing.slots)
        if sizing.slots > 3:
            raise WorkerError("memory", f"no memory for {sizing.slots} slots")
        allot(runner, sizing)

    monkeypatch.setattr(Runner, "allot", small)
    loaded = LoadedModel.load(ModelFolder.load(TINY), settings, slots=12)
    assert tried == [12, 6, 3] and loaded.runner.slots == 3 == loaded.sizing.slots
    assert loaded.runner.capacity == loaded.sizing.capacity == 3 * loaded.runner.max_length

    def none(runner: Runner, sizing: Sizing) -> None:
        raise WorkerError("memory", "none at all")

    monkeypatch.setattr(Runner, "allot", none)
    with pytest.raises(WorkerError, match="none at all"):
        LoadedModel.load(ModelFolder.load(TINY), settings, slots=2)


@pytest.mark.parametrize("alone", [True, False])
def test_the_threads_of_several_models_sleep_while_they_wait(
    alone: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    spins = Calibration(1, True, 4, 16, "measured")
    monkeypatch.setattr(models, "_calibrate", lambda *_: spins)
    opened = host.session_options

    def options(threads: int, spinning: bool, weights: Path | None) -> ort.SessionOptions:
        asked.append(spinning)
        return opened(threads, spinning, weights)

    monkeypatch.setattr(host, "session_options", options)
    settings = Settings(cache_dir=tmp_path, max_context=64)
    loaded = LoadedModel.load(ModelFolder.load(TINY), settings, alone=alone)
    assert asked == [alone] == [loaded.calibration.spinning]
    loaded.runner.close()


def test_what_is_loaded_has_the_rows_that_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = weights_bytes(ModelFolder.load(TINY)) + (6 << 20)
    for place in (models, host):
        monkeypatch.setattr(place, "free_bytes", lambda: free)
    settings = Settings(threads=1, cache_dir=tmp_path, memory_percent=50)
    loaded = LoadedModel.load(ModelFolder.load(TINY), settings)
    runner, sizing = loaded.runner, loaded.sizing
    wishes = Wishes.of(settings, loaded.folder.context_length)
    per_row = 8 * runner.vocab_size
    assert sizing == on_host(wishes, free=6 << 20, per_token=2560, per_row=per_row)
    assert (runner.slots, runner.staging, runner.max_length, runner.capacity) == (
        sizing.slots,
        sizing.staging,
        sizing.max_length,
        sizing.capacity,
    )
    assert runner.kv_bytes_per_token == sizing.kv_bytes_per_token == 2560
    assert sizing.paged and runner.max_length < 1024
    assert f"{runner.slots} slots of {runner.max_length} tokens" in runner.device_line


def test_where_not_one_row_fits_the_numbers_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in (models, host):
        monkeypatch.setattr(place, "free_bytes", lambda: 0)
    with pytest.raises(WorkerError) as refusal:
        LoadedModel.load(ModelFolder.load(TINY), Settings(threads=1, cache_dir=tmp_path))
    assert refusal.value.code == "memory"
    assert "0.0 MiB are free" in str(refusal.value) and "80 %" in str(refusal.value)
