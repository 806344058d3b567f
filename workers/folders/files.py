"""Writes a file whole or not at all: who reads it meanwhile sees the old one or the new one.

Knows nothing of what is written.
"""

import os
import tempfile
from pathlib import Path


def write_whole(file: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write `data` to `file` with permissions `mode`, its folder made where there is none.

    Raises OSError; then nothing of it stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
