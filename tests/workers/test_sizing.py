"""Numbers to a Sizing: what fits, what gives way first, what is refused."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import WorkerError
from orchestrator.fleet import context_of
from orchestrator.settings import Settings
from workers.folders.folder import TINY, ModelFolder
from workers.running import memory
from workers.running.sizing import (
    LEAST_TOKENS,
    Sizing,
    Wishes,
    longest_here,
    on_device,
    on_host,
    per_token,
    weights_bytes,
)

MIB = 2**20
WISHES = Wishes(length=4096, percent=100)


@pytest.mark.parametrize(
    ("wishes", "free", "expected"),
    [  # 1000 bytes a token: free bytes // 1000 are tokens; three staging rows take 64 each
        (WISHES, 10**9, Sizing(32, 4, 4096, 131072, 0, 1000, paged=False)),
        (WISHES, 2 * 10**8, Sizing(32, 4, 4096, 131072, 0, 1000, paged=True)),
        (WISHES, 50 * 10**6, Sizing(32, 4, 4096, 50_000 - 192 - 4096, 0, 1000)),
        (WISHES, 10 * 10**6, Sizing(11, 4, 4096, 10_000 - 192 - 4096, 0, 1000)),
        (WISHES, 2 * 10**6, Sizing(1, 4, 904, 904, 0, 1000)),
        (replace(WISHES, percent=50), 4 * 10**6, Sizing(1, 4, 904, 904, 0, 1000)),
        (replace(WISHES, slots=20), 2 * 10**6, Sizing(20, 4, 904, 904, 0, 1000)),
        (replace(WISHES, most=8), 10**9, Sizing(8, 4, 4096, 32768, 0, 1000, paged=False)),
        (replace(WISHES, length=20), 10**9, Sizing(32, 4, 20, 640, 0, 1000, paged=False)),
        (
            replace(WISHES, prefix_cache_bytes=10**8),
            4 * 10**6,
            Sizing(2, 4, 1404, 1404, 10**6, 1000),
        ),
    ],
)
def test_rows_of_the_host_share_what_is_free(wishes: Wishes, free: int, expected: Sizing) -> None:
    assert on_host(wishes, free=free, per_token=1000, per_row=0) == expected


@pytest.mark.parametrize(
    ("wishes", "free", "expected"),
    [
        (replace(WISHES, staging=1, most=128), 10**9, (128, 4096)),
        (replace(WISHES, staging=1, most=128), 10**8, (23, 4096)),
        (replace(WISHES, staging=1, slots=10), 10**8, (10, 4096)),
        (replace(WISHES, staging=1, slots=10), 4 * 10**6, (1, 2000)),
        (replace(WISHES, staging=1, slots=10, grain=256), 4 * 10**6, (1, 1792)),
        (replace(WISHES, staging=1, slots=10, length=1000, grain=256), 10**7, (8, 1000)),
    ],
)
def test_rows_of_a_device_are_whole(wishes: Wishes, free: int, expected: tuple[int, int]) -> None:
    sizing = on_device(wishes, free=free, per_token=1000, per_row=0)
    assert (sizing.slots, sizing.max_length) == expected
    assert sizing.capacity == sizing.slots * sizing.max_length and not sizing.paged


def test_no_sizing_takes_more_than_it_may(seed: int = random.randrange(2**32)) -> None:
    print("seed", seed)
    source = random.Random(seed)
    refused = fitted = 0
    for _ in range(3000):
        wishes = Wishes(
            length=source.choice([16, 100, 4096, 131_072]),
            slots=source.choice([0, 0, 1, 7, 64]),
            most=source.choice([1, 32, 128]),
            staging=source.choice([1, 4]),
            percent=source.randint(1, 100),
            prefix_cache_bytes=source.choice([0, MIB, 512 * MIB]),
            grain=source.choice([1, 256]),
        )
        free = int(2 ** source.uniform(10, 37)) - 5000
        token, row = source.choice([100, 2560, 131_072]), source.choice([0, 4000, 1_200_000])
        for size, device in ((on_host, False), (on_device, True)):
            try:
                sizing = size(wishes, free=free, per_token=token, per_row=row)
            except WorkerError as error:
                assert error.code == "memory" and f"{token} bytes a token" in error.message
                refused += 1
                continue
            fitted += 1
            assert 1 <= sizing.slots <= (wishes.slots or wishes.most)
            assert min(LEAST_TOKENS, wishes.length) <= sizing.max_length <= wishes.length
            assert sizing.max_length <= sizing.capacity <= sizing.slots * sizing.max_length
            assert sizing.prefix_cache_bytes <= wishes.prefix_cache_bytes
            rows = sizing.slots + sizing.staging
            if device:
                whole = -(-sizing.max_length // wishes.grain) * wishes.grain
                taken = rows * whole * token
            else:
                taken = (sizing.capacity + sizing.max_length) * token
                assert sizing.slots == wishes.slots or not wishes.slots
            taken += rows * row + sizing.prefix_cache_bytes
            assert taken <= max(0, free) * wishes.percent // 100
    assert refused > 300 and fitted > 1000


def test_the_settings_are_wishes() -> None:
    settings = Settings(slots=5, max_context=300, memory_percent=70, prefix_cache_mib=3, threads=1)
    wishes = Wishes.of(settings, 1000, most=9)
    assert wishes == Wishes(300, 5, 9, percent=70, prefix_cache_bytes=3 * MIB)
    assert Wishes.of(settings, 200).length == 200


def test_what_a_machine_of_any_state_has_room_for(tmp_path: Path) -> None:
    folder, settings = ModelFolder.load(TINY), Settings(memory_percent=10, prefix_cache_mib=512)
    weights, token = weights_bytes(folder), per_token(folder, 2)
    assert weights > 2**20  # counted
    assert longest_here(folder, settings, 2**40) == folder.context_length
    assert longest_here(folder, replace(settings, max_context=77), 2**40) == 77
    assert longest_here(folder, settings, weights + 200 * token) == 100  # a row and its prompt
    assert longest_here(folder, settings, 0) == folder.context_length  # its own worker will tell


def test_only_who_works_here_looks_at_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ModelFolder.load(TINY)
    small = weights_bytes(folder) + 200 * per_token(folder, 2)
    monkeypatch.setattr(memory, "total_bytes", lambda: small)
    assert context_of(folder, Settings()) == 100
    elsewhere = Settings(broker_url="redis://localhost/0", max_context=500)
    assert context_of(folder, elsewhere) == 500


def test_a_graph_with_a_strange_name_is_found(tmp_path: Path) -> None:
    graph = tmp_path / "model[1].onnx"
    for name, size in (("model[1].onnx", 10), ("model[1].onnx.data", 300), ("other.onnx", 5000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weights_bytes(replace(ModelFolder.load(TINY), graph=graph)) == 310
