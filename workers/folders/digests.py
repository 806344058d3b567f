"""Digests of large files, remembered: weights are read whole once, not at each start.

A file is the one that was read as long as its path, its size and its times are the same; its status
time (ctime) is one of them, which no tool sets back. Knows nothing of what the files mean.
"""

import json
import logging
from pathlib import Path

from workers.folders.files import write_whole
from workers.folders.folder import file_digest

log = logging.getLogger("penstock.model")

LARGE_BYTES = 1 << 20
"""Smaller files are read each time: that is as fast."""
_FILE = "digests.json"


class Digests:
    """SHA-256 of files, kept in a file of the folder `cache`."""

    def __init__(self, cache: Path) -> None:
        self._file = cache / _FILE
        self._known = self._read()

    def __call__(self, file: Path) -> bytes:
        """Of one file; read whole unless it is known. Raises OSError as reading does."""
        facts = _facts(file)
        if file.stat().st_size < LARGE_BYTES:
            return file_digest(file)
        known = self._known.get(str(file))
        if known is None or known[:-1] != facts:
            known = [*facts, file_digest(file).hex()]
            if _facts(file) == facts:  # nobody wrote meanwhile
                self._keep(file, known)
        return bytes.fromhex(str(known[-1]))

    def _keep(self, file: Path, entry: list[int | str]) -> None:
        """With what other processes have kept since; a cache that cannot be written is none."""
        self._known = self._read() | {str(file): entry}
        try:
            write_whole(self._file, json.dumps(self._known).encode())
        except OSError as error:
            log.warning("digest.not_kept file=%s: %s", self._file, error)

    def _read(self) -> dict[str, list[int | str]]:
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        entries = found.items() if isinstance(found, dict) else ()
        return {name: entry for name, entry in entries if _is_entry(entry)}


def _facts(file: Path) -> list[int | str]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 4 or not isinstance(entry[3], str):
        return False
    try:
        return len(bytes.fromhex(entry[3])) == 32
    except ValueError:
        return False
