"""What this machine is: processors that may be used, their name, their cache; who else uses them.

`os.cpu_count()` counts the host's processors: a container with a quota of two on a host of 64 would
open 64 threads that take turns. So affinity and the quotas of control groups (versions 1 and 2) are
read. Knows nothing of models. Linux tells all of it; elsewhere what Python knows stands in.
"""

import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path("/")
_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts that speed depends on; bytes are 0 where the system does not tell."""

    cpu: str
    cores: int  # that this process may use
    threads: int  # one for each physical core of them, by default
    memory_bytes: int
    cache_bytes: int  # of the last level, which other machines on this host may share
    runtime: str  # of onnxruntime


def this_machine(root: Path = ROOT) -> Machine:
    """The machine that this process runs on."""
    return Machine(
        cpu=cpu_name(root),
        cores=allowed_cores(root),
        threads=default_threads(root),
        memory_bytes=_memory(root),
        cache_bytes=_cache(root),
        runtime=runtime_version(),
    )


def allowed_cores(root: Path = ROOT) -> int:
    """Processors by affinity and quota, at least 1; a quota of 1.5 is one thread's.

    A second thread on half a processor stops the first at every step, until the next period.
    """
    quota = _quota(root)
    cores = len(_affinity())
    return cores if quota is None else max(1, min(cores, int(quota)))


def default_threads(root: Path = ROOT) -> int:
    """One thread for each physical core among the allowed processors, within the quota."""
    topology = root / "sys/devices/system/cpu"
    siblings = {
        _text(topology / f"cpu{each}/topology/thread_siblings_list") or str(each)
        for each in _affinity()
    }
    return min(len(siblings), allowed_cores(root))


def cpu_name(root: Path = ROOT) -> str:
    """As the processor calls itself, or its architecture."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def runtime_version() -> str:
    """Of the installed onnxruntime, whichever of its packages it is."""
    for name in _RUNTIMES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


# --- who else uses the processors -----------------------------------------------------------------


class Others:
    """What other processes, and the host, took of the processors since this object was made."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._busy, self._own, self._began = busy_seconds(root), _own(), time.perf_counter()

    def share(self) -> float:
        """From 0 to 1; 0 where the system does not tell."""
        busy, seconds = busy_seconds(self._root), time.perf_counter() - self._began
        if busy is None or self._busy is None or seconds <= 0:
            return 0.0
        others = (busy - self._busy) - (_own() - self._own)
        return min(1.0, max(0.0, others / (seconds * (os.cpu_count() or 1))))


def busy_seconds(root: Path = ROOT) -> float | None:
    """Processor seconds that all processes and the host took from this machine so far."""
    fields = _text(root / "proc/stat").partition("\n")[0].split()[1:9]
    if len(fields) < 8:
        return None
    ticks = [int(each) for each in fields]
    idle = ticks[3] + ticks[4]  # idle and iowait, proc(5)
    return float(sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    return time.process_time()


# --- what the system's files say ------------------------------------------------------------------


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _quota(root: Path) -> float | None:
    """Processors that the control groups allow, the narrowest of the whole path; None: no limit."""
    found = []
    for group in control_groups(root):
        limit = parse_cpu_max(_text(group / "cpu.max"))
        if limit is None:
            limit = parse_cfs(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))
        if limit is not None:
            found.append(limit)
    return min(found, default=None)


def parse_cpu_max(text: str) -> float | None:
    """`cpu.max` of version 2, "QUOTA PERIOD" in microseconds, in processors; None: no limit."""
    quota, _, period = text.strip().partition(" ")
    return parse_cfs(quota, period or "100000")


def parse_cfs(quota: str, period: str) -> float | None:
    """`cpu.cfs_quota_us` and `cpu.cfs_period_us` in processors; None: no limit, or no numbers."""
    try:
        allowed, every = int(quota), int(period)
    except ValueError:  # "max", or nothing there
        return None
    return allowed / every if allowed > 0 and every > 0 else None


def control_groups(root: Path = ROOT) -> list[Path]:
    """The folders of this process's control groups and all above them, as far as they are shown.

    Inside a container the path may be the host's: then only the mount itself is there, which shows
    the container's own group.
    """
    mount = root / "sys/fs/cgroup"
    found: dict[Path, None] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        parts = [each for each in path.split("/") if each]
        for base in dict.fromkeys([controllers, *controllers.split(",")]):
            found |= {mount.joinpath(base, *parts[:depth]): None for depth in range(len(parts) + 1)}
    return list(found)


def _memory(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _cache(root: Path) -> int:
    """The largest cache of the first allowed processor."""
    first = root / f"sys/devices/system/cpu/cpu{min(_affinity())}/cache"
    return max((_size(_text(each)) for each in first.glob("index*/size")), default=0)


def _size(text: str) -> int:
    text = text.strip()
    unit = {"K": 1024, "M": 1024**2, "G": 1024**3}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * unit if digits.isdecimal() else 0


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
