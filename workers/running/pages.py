"""Large memory of this process in pages of 2 MiB: weights that were just loaded are read faster.

A step reads every weight once, and to find them in pages of 4 KiB costs up to a fifth of its time
(docs/decisions/0022-large-pages.md). The C library could ask for large pages by itself, but only if
an environment variable said so before the process began. Linux only; knows nothing of models.
"""

import ctypes
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

PAGE = 2 << 20
_ROOT = Path("/")
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1: at once, where MADV_HUGEPAGE waits for a daemon
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *$")


def use_large_pages(root: Path = _ROOT) -> int:
    """Ask for them wherever most of a large piece of anonymous memory is in use; bytes given.

    Where the system is told to give none nothing changes, nor does memory that was asked to stay in
    small pages (kv.py). Takes a second for every half gigabyte; never raises.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or "[never]" in _text(root / "sys/kernel/mm/transparent_hugepage/enabled"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    given = 0
    for start, end in _used(_text(root / "proc/self/smaps")):
        if madvise(start, end - start, advice) == 0:
            given += (end - start) * (madvise(start, end - start, _COLLAPSE) == 0)
    return given


def _used(smaps: str) -> Iterator[tuple[int, int]]:
    """Whole large pages of private memory of no file and no name of which half is there at least.

    The stacks of threads are such memory too, and mostly empty.
    """
    for piece in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        header, _, rest = piece.partition("\n")
        found = _HEADER.match(header)
        if found is None or re.search(r"^VmFlags:.* nh\b", rest, re.MULTILINE):
            continue
        start, end = int(found[1], 16), int(found[2], 16)
        resident = re.search(r"^Rss: +(\d+) kB", rest, re.MULTILINE)
        first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if last > first and resident and int(resident[1]) * 2048 >= end - start:
            yield first, last


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
