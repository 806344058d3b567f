"""What the system's files say of processors and quotas, in files of every kind."""

import os
from pathlib import Path

import pytest

from workers.running import machine
from workers.running.machine import Others, allowed_cores, default_threads, this_machine

AFFINITY = 8


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(AFFINITY)))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("text", "processors"),
    [
        ("max 100000\n", None),
        ("max\n", None),
        ("200000 100000\n", 2.0),
        ("150000 100000\n", 1.5),
        ("50000\n", 0.5),
        ("0 100000\n", None),
        ("100000 0\n", None),
        ("", None),
        ("nonsense\n", None),
    ],
)
def test_the_quota_of_version_2(text: str, processors: float | None) -> None:
    assert machine.parse_cpu_max(text) == processors


@pytest.mark.parametrize(
    ("quota", "period", "processors"),
    [
        ("-1\n", "100000\n", None),
        ("300000\n", "100000\n", 3.0),
        ("25000\n", "50000\n", 0.5),
        ("", "", None),
        ("300000\n", "", None),
    ],
)
def test_the_quota_of_version_1(quota: str, period: str, processors: float | None) -> None:
    assert machine.parse_cfs(quota, period) == processors


CASES = {
    "no groups at all": ({}, AFFINITY),
    "version 2, unlimited": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
        AFFINITY,
    ),
    "version 2, own root": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"},
        3,
    ),
    "version 2, the parent is narrower": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "600000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
        },
        2,
    ),
    "version 2, a quota beyond the affinity": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"},
        AFFINITY,
    ),
    "a part of a processor is one thread": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
        1,
    ),
    "1.5 processors are one thread": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        1,
    ),
    "version 1, the host's path, the container's mount": (
        {
            "proc/self/cgroup": "4:memory:/x\n1:cpu,cpuacct:/docker/0123\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "version 1, both names in one folder": (
        {
            "proc/self/cgroup": "1:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1, unlimited": (
        {
            "proc/self/cgroup": "1:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        AFFINITY,
    ),
    "a line that is none": ({"proc/self/cgroup": "nonsense\n"}, AFFINITY),
}


@pytest.mark.parametrize(("files", "cores"), CASES.values(), ids=CASES.keys())
def test_cores_by_affinity_and_quota(files: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert allowed_cores(write(tmp_path, files)) == cores


def siblings(pairs: bool) -> dict[str, str]:
    base = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {
        base.format(cpu): f"{cpu % 4},{cpu % 4 + 4}\n" if pairs else f"{cpu}\n"
        for cpu in range(AFFINITY)
    }


def test_one_thread_for_each_physical_core_within_the_quota(tmp_path: Path) -> None:
    assert default_threads(tmp_path) == AFFINITY  # nothing is known of cores
    assert default_threads(write(tmp_path / "pairs", siblings(True))) == 4
    assert default_threads(write(tmp_path / "single", siblings(False))) == AFFINITY
    quota = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}
    assert default_threads(write(tmp_path / "quota", siblings(True) | quota)) == 3


def test_facts_from_files(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some Processor 9000\n",
            "proc/meminfo": "MemTotal:       1024 kB\nMemFree: 1 kB\n",
            "sys/devices/system/cpu/cpu0/cache/index0/size": "48K\n",
            "sys/devices/system/cpu/cpu0/cache/index3/size": "32M\n",
        },
    )
    found = this_machine(root)
    assert (found.cpu, found.memory_bytes, found.cache_bytes) == (
        "Some Processor 9000",
        1024 * 1024,
        32 << 20,
    )
    assert found.runtime != "unknown"


def test_a_system_that_tells_nothing_has_facts_all_the_same(tmp_path: Path) -> None:
    found = this_machine(tmp_path)
    assert found.cpu
    assert found.cores == found.threads == AFFINITY
    assert (found.memory_bytes, found.cache_bytes) == (0, 0)


def test_what_others_took_is_what_was_busy_less_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    own, now = iter((1.0, 3.0)), iter((0.0, 10.0))
    monkeypatch.setattr(machine, "_own", lambda: next(own))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    line = "cpu  {} 0 0 5 5 0 0 0 0 0\n"
    write(tmp_path, {"proc/stat": line.format(100)})
    others = Others(tmp_path)
    write(tmp_path, {"proc/stat": line.format(100 + 8 * ticks)})
    assert others.share() == pytest.approx((8 - 2) / (10 * 2))


def test_what_others_took_is_nothing_where_nothing_is_told(tmp_path: Path) -> None:
    assert Others(tmp_path).share() == 0.0
