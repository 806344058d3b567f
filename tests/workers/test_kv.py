"""Rows of KV on the host: what is moved is moved whole, what is needed stays, the rest may go."""

import ctypes
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator.errors import WorkerError
from workers.running.kv import ELEMENTS, Block, HostMemory
from workers.running.memory import resident_bytes

KINDS = {"past.k": "tensor(float)", "past.v": "tensor(float)"}
PRESENT = {"past.k": "present.k", "past.v": "present.v"}
MIB = 2**20


def make(rows: int, length: int, room: int | None, heads: int = 2, size: int = 64) -> HostMemory:
    return HostMemory(KINDS, PRESENT, rows=rows, heads=heads, length=length, size=size, room=room)


class Bound:
    """What a session sees of a binding: memory at an address, of a type and a shape."""

    def __init__(self) -> None:
        self.inputs: dict[str, npt.NDArray[Any]] = {}
        self.outputs: dict[str, npt.NDArray[Any]] = {}

    def bind_input(self, *tensor: Any) -> None:
        self.inputs[tensor[0]] = self._view(*tensor)

    def bind_output(self, *tensor: Any) -> None:
        self.outputs[tensor[0]] = self._view(*tensor)

    def _view(
        self, name: str, device: str, index: int, element: Any, shape: Any, address: int
    ) -> npt.NDArray[Any]:
        dtype = np.dtype(np.uint16 if element == 16 else element)
        assert (device, index) == ("cpu", 0)
        count = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_uint8 * count).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)


def bound(memory: HostMemory, first: int, count: int) -> Bound:
    binding = Bound()
    memory.bind(binding, first, count)
    return binding


@pytest.mark.parametrize("kind", ELEMENTS)
def test_past_and_present_are_the_rows_themselves(kind: str) -> None:
    memory = HostMemory(
        {"past.k": kind}, {"past.k": "present.k"}, rows=3, heads=2, length=5, size=4
    )
    rows = bound(memory, 1, 2)
    assert rows.inputs["past.k"].shape == (2, 2, 5, 4)
    rows.outputs["present.k"][...] = np.arange(80).reshape(2, 2, 5, 4)
    assert np.array_equal(rows.inputs["past.k"], rows.outputs["present.k"])
    assert np.array_equal(memory.read(2, 1, 3).parts[0], rows.inputs["past.k"][1, :, 1:3])
    assert not bound(memory, 0, 1).inputs["past.k"].any()
    assert memory.bytes_per_token == 8 * np.dtype(ELEMENTS[kind][0]).itemsize
    assert memory.nbytes == 15 * memory.bytes_per_token


@pytest.mark.parametrize("room", [None, 1, 300])
def test_whatever_is_done_with_rows_what_is_needed_stays(room: int | None) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    source, rows, length = random.Random(seed), 5, 97  # heads share pages
    memory, counter = make(rows, length, room), iter(range(1, 10**9))
    held: dict[int, list[int]] = {row: [] for row in range(rows)}  # what each position says
    blocks: list[tuple[list[int], int, Block]] = []

    def step(row: int, count: int) -> None:
        """As a call of the session does."""
        start = len(held[row])
        values = [next(counter) for _ in range(count)]
        memory.hold(row, [start + count], min(length, start + count + source.randrange(9)))
        for array in bound(memory, row, 1).outputs.values():
            array[0, :, start : start + count] = np.array(values, np.float32)[None, :, None]
        held[row] += values

    for _ in range(1500):
        row, other = source.sample(range(rows), 2)
        end = len(held[row])
        match source.choice(["step", "copy", "read", "write", "trim"]):
            case "step" if end < length:
                step(row, source.randint(1, length - end))
            case "copy":
                count = source.randint(0, end)
                memory.copy(row, other, count)
                held[other] = held[row][:count]
            case "read" if end:
                start = source.randrange(end)
                block = memory.read(row, start, end)
                assert (block.length, block.nbytes) == (end - start, 1024 * (end - start))
                blocks.append((held[row][start:], start, block))
            case "write" if blocks:
                values, start, block = source.choice(blocks)
                if start <= end:
                    memory.write(row, start, block)
                    held[row] = held[row][:start] + values
            case "trim":
                count = source.randint(0, end)
                memory.trim(row, count)
                held[row] = held[row][:count]
        for each, values in held.items():
            for part in memory.read(each, 0, len(values)).parts:
                assert (part == np.array(values, np.float32)[None, :, None]).all(), (seed, each)


def fill(memory: HostMemory, row: int, end: int) -> None:
    memory.hold(row, [end])
    for array in bound(memory, row, 1).outputs.values():
        array[0, :, :end] = 1


def test_a_row_costs_what_was_written() -> None:
    before = resident_bytes()
    memory = make(64, 32_768, room=10**9)
    assert memory.nbytes == 2048 * MIB
    for row in range(64):
        fill(memory, row, 64)  # 64 KiB
    assert resident_bytes() - before < 12 * MIB


def test_rows_that_took_turns_hold_no_more_than_the_room() -> None:
    """Each was long once; together they would hold 64 MiB, the room is for 8."""
    memory = make(16, 4096, room=8192)
    before, most = resident_bytes(), 0
    for turn in range(48):
        fill(memory, turn % 16, 4096)
        memory.trim(turn % 16, 100)
        most = max(most, resident_bytes() - before)
    assert 4 * MIB < most < 16 * MIB
    for array in bound(memory, 0, 16).inputs.values():
        assert (array[:, :, :100] == 1).all()


def test_where_there_is_room_nothing_is_given_back() -> None:
    memory = make(16, 4096, room=16 * 4096)
    before = resident_bytes()
    for row in range(16):
        fill(memory, row, 4096)
        memory.trim(row, 0)
    assert resident_bytes() - before > 60 * MIB


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(WorkerError) as refusal:
        make(2**20, 2**24, room=None, size=1024)
    assert refusal.value.code == "memory"
    with pytest.raises(WorkerError, match="KV of type tensor\\(int8\\)") as refusal:
        HostMemory({"a": "tensor(int8)"}, {"a": "b"}, rows=1, heads=1, length=1, size=1)
    assert refusal.value.code == "model"
