"""When, where and with which versions a benchmark ran."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from workers.running.machine import cpu_name

PACKAGES = (
    *("onnxruntime-gpu", "onnxruntime", "numpy", "numba", "sqlalchemy", "celery", "tokenizers"),
)


def setting(shape: str, threads: int) -> dict[str, str]:
    """What stands above the tables."""
    found = {"Python": platform.python_version(), **{name: _installed(name) for name in PACKAGES}}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}",
        "model": f"{shape}, random weights, {threads} threads",
        "versions": ", ".join(f"{name} {found[name]}" for name in found if found[name]),
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
