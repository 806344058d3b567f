"""Ceilings are measured, not known: what can be said of them are laws, not numbers."""

from dataclasses import replace
from typing import Any

import onnxruntime as ort
import pytest

from workers.measuring import ceilings
from workers.running.machine import this_machine


def opened(graph: bytes, threads: int, spinning: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def test_every_ceiling_is_that_of_a_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both matrices run on this runtime; a megabyte a second would be no ceiling at all."""
    monkeypatch.setattr(ceilings, "SECONDS", 0.05)
    monkeypatch.setattr(ceilings, "_LEAST_ARRAY", 8 << 20)
    found = ceilings.measure(replace(this_machine(), cache_bytes=0), 1, opened)
    assert 1e8 < found.read_bandwidth < 1e13
    assert 1e8 < found.fp32_rate < 1e14
    assert 1e8 < found.int4_rate < 1e14


def test_of_two_measurements_the_higher_counts_in_each() -> None:
    one, other = ceilings.Ceilings(1.0, 20.0, 3.0), ceilings.Ceilings(10.0, 2.0, 3.0)
    assert one.best(other) == other.best(one) == ceilings.Ceilings(10.0, 20.0, 3.0)


@pytest.mark.parametrize(
    ("cache", "memory", "size"),
    [
        (0, 0, 256 << 20),
        (32 << 20, 64 << 30, 256 << 20),
        (480 << 20, 64 << 30, 960 << 20),
        (4 << 30, 64 << 30, 2 << 30),
        (480 << 20, 2 << 30, 256 << 20),
    ],
)
def test_the_array_is_beyond_the_cache_and_within_the_memory(
    cache: int, memory: int, size: int
) -> None:
    machine = replace(this_machine(), cache_bytes=cache, memory_bytes=memory)
    assert ceilings.array_bytes(machine) == size
