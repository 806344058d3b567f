"""What is free, read from the files of every kind of machine and container."""

from collections.abc import Callable
from pathlib import Path

import pytest

from workers.running.memory import free_bytes, resident_bytes, total_bytes

MIB = 2**20
Tree = Callable[[dict[str, str]], Path]
MEMINFO = "MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:  4194304 kB\n"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def make(files: dict[str, str]) -> Path:
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def test_without_limits_it_is_the_machines(tree: Tree) -> None:
    root = tree({})
    assert (free_bytes(root), total_bytes(root)) == (4096 * MIB, 8192 * MIB)


def test_version_2_the_narrowest_of_the_path_counts(tree: Tree) -> None:
    groups = {
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/memory.max": f"{1000 * MIB}\n",
        "sys/fs/cgroup/pod/memory.current": f"{600 * MIB}\n",
        "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {100 * MIB}\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/box/memory.current": f"{10 * MIB}\n",
    }
    root = tree(groups)
    assert (free_bytes(root), total_bytes(root)) == (500 * MIB, 1000 * MIB)
    root = tree({"sys/fs/cgroup/pod/box/memory.max": f"{300 * MIB}\n"})
    assert (free_bytes(root), total_bytes(root)) == (290 * MIB, 300 * MIB)


def test_version_1_with_the_hosts_path(tree: Tree) -> None:
    group = "sys/fs/cgroup/memory"
    root = tree(
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            f"{group}/memory.limit_in_bytes": f"{512 * MIB}\n",
            f"{group}/memory.usage_in_bytes": f"{500 * MIB}\n",
            f"{group}/memory.stat": f"inactive_file 7\ntotal_inactive_file {200 * MIB}\n",
        }
    )
    assert (free_bytes(root), total_bytes(root)) == (212 * MIB, 512 * MIB)


def test_version_1_without_a_limit_says_a_huge_number(tree: Tree) -> None:
    root = tree(
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        }
    )
    assert (free_bytes(root), total_bytes(root)) == (4096 * MIB, 8192 * MIB)


def test_a_group_that_is_full_leaves_nothing(tree: Tree) -> None:
    root = tree(
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "100\n",
            "sys/fs/cgroup/memory.current": "120\n",
        }
    )
    assert free_bytes(root) == 0


def test_where_nothing_is_told_the_machine_is_taken_to_be_empty(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) == total_bytes(tmp_path) >= total_bytes()


def test_this_machine(tmp_path: Path) -> None:
    assert 0 < free_bytes() <= total_bytes()
    assert 0 < resident_bytes() <= total_bytes()
