"""What onnxruntime says when memory is short, fewer slots after that, and at loading."""

from typing import Any

import numpy as np
import pytest

from orchestrator.errors import WorkerError
from orchestrator.settings import Settings
from workers import model as models
from workers.folder import TINY, ModelFolder
from workers.model import LoadedModel
from workers.runner import Runner

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
        def run_with_iobinding(self, _binding: object) -> None:
            raise said

    real = runner._session
    monkeypatch.setattr(runner, "_decode_binding", lambda batch: None)
    runner._session = Session()
    with pytest.raises(WorkerError) as caught:
        runner.decode([7], [0])
    assert caught.value.code == code
    runner._session = real


def test_a_model_that_does_not_fit_is_loaded_with_half_the_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []

    def small(*args: Any, slots: int, **how: Any) -> Runner:
        tried.append(slots)
        if slots > 3:
            raise WorkerError("memory", f"no memory for {slots} slots")
        return Runner(*args, slots=slots, **how)

    monkeypatch.setattr(models, "Runner", small)
    folder = ModelFolder.load(TINY)
    loaded = LoadedModel.load(folder, Settings(threads=1), slots=12)
    assert tried == [12, 6, 3] and loaded.runner.slots == 3

    def none(*args: Any, slots: int, **how: Any) -> Runner:
        raise WorkerError("memory", "none at all")

    monkeypatch.setattr(models, "Runner", none)
    with pytest.raises(WorkerError, match="none at all"):
        LoadedModel.load(folder, Settings(threads=1), slots=2)
