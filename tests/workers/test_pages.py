"""Large pages: who gets them, who keeps small ones, and that nothing in them changes."""

import mmap
import os
import platform
import re
from pathlib import Path

import pytest

from workers.running.kv import HostMemory
from workers.running.memory import resident_bytes
from workers.running.pages import PAGE, use_large_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SMAPS = Path("/proc/self/smaps")
KERNEL = tuple(int(each) for each in re.findall(r"\d+", platform.release())[:2])
GIVEN = ENABLED.is_file() and "[never]" not in ENABLED.read_text() and KERNEL >= (6, 1)
needs_them = pytest.mark.skipif(not GIVEN, reason="this system gives no large pages at once")
MIB = 2**20


def large_bytes() -> int:
    found = re.findall(r"^AnonHugePages: +(\d+) kB", SMAPS.read_text(), re.MULTILINE)
    return sum(map(int, found)) * 1024


def kept_small() -> int:
    """Mappings that are to have no large pages."""
    return len(re.findall(r"^VmFlags:.* nh\b", SMAPS.read_text(), re.MULTILINE))


def anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@needs_them
def test_what_is_used_lies_in_large_pages_and_is_the_same() -> None:
    content = os.urandom(1 << 16) * 512  # 32 MiB
    memory = anonymous(len(content))
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # as if they had been short when it was written
    memory[:] = content
    memory.madvise(mmap.MADV_HUGEPAGE)
    before, held = large_bytes(), resident_bytes()
    assert use_large_pages() > 24 * MIB
    assert memory[:] == content
    assert large_bytes() - before > 24 * MIB
    assert resident_bytes() - held < 16 * PAGE


@needs_them
def test_memory_that_is_hardly_used_stays_so() -> None:
    use_large_pages()
    sparse = anonymous(64 * PAGE)
    sparse.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, len(sparse), PAGE):
        sparse[at] = 1
    sparse.madvise(mmap.MADV_HUGEPAGE)
    held = resident_bytes()
    use_large_pages()
    assert resident_bytes() - held < 8 * PAGE


@needs_them
def test_rows_that_are_paged_stay_in_small_pages() -> None:
    use_large_pages()
    memory = HostMemory(
        {"k": "tensor(float)"}, {"k": "p"}, rows=8, heads=2, length=4096, size=64, room=100
    )
    rows = memory.read(0, 0, 4096)
    for row in range(8):
        memory.write(row, 0, rows)
    before, small = large_bytes(), kept_small()
    use_large_pages()
    assert large_bytes() - before < 4 * PAGE
    assert kept_small() == small > 0


def test_where_none_are_given_nothing_is_asked(tmp_path: Path) -> None:
    assert use_large_pages(tmp_path) == 0
    for file in (ENABLED, SMAPS):
        (tmp_path / file.relative_to("/")).parent.mkdir(parents=True)
    (tmp_path / SMAPS.relative_to("/")).write_text(SMAPS.read_text())
    (tmp_path / ENABLED.relative_to("/")).write_text("always madvise [never]\n")
    memory = anonymous(32 * MIB)
    memory[:] = bytes(32 * MIB)
    assert use_large_pages(tmp_path) == 0
