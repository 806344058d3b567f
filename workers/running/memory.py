"""How much memory this process holds, may still take, and could ever take. Linux tells all of it.

Knows nothing of models or devices; the control groups are those of machine.py.
"""

import os
import resource
from pathlib import Path

from workers.running.machine import control_groups

ROOT = Path("/")
# Version 2 and version 1: what a group may hold, what it holds, and what of that are files that
# nobody has asked for lately: the system drops them before it refuses anything.
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def resident_bytes() -> int:
    """Resident memory now; where the system does not tell, the most there ever was."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def free_bytes(root: Path = ROOT) -> int:
    """What this process may still take: of the machine, and of every control group it is in."""
    machine = _meminfo(root, "MemAvailable")
    return min([_physical() if machine is None else machine, *_groups(root, used=True)])


def total_bytes(root: Path = ROOT) -> int:
    """What it could take were there nobody else."""
    machine = _meminfo(root, "MemTotal")
    return min([_physical() if machine is None else machine, *_groups(root, used=False)])


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo(root: Path, name: str) -> int | None:
    return _table(root / "proc/meminfo", 1024).get(f"{name}:")


def _groups(root: Path, *, used: bool) -> list[int]:
    """Of each group with a limit: what is left of it, or (not `used`) the limit."""
    left = []
    for group in control_groups(root):
        for limit_file, usage_file, inactive in _GROUP_FILES:
            limit, usage = _number(group / limit_file), _number(group / usage_file)
            if limit is None or usage is None:
                continue
            held = usage - _table(group / "memory.stat", 1).get(inactive, 0) if used else 0
            left.append(max(0, limit - max(0, held)))
    return left


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _table(file: Path, unit: int) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) * unit for line in lines if len(line) > 1 and line[1].isdecimal()}
