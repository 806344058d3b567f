"""The environment, read once at the door into one frozen Settings.

Every variable has the prefix `PENSTOCK_`, a default, and a line in docs/settings.md; an unknown
one with the prefix is an error, since a misspelt setting that is ignored is a setting lost.
Knows nothing of what the values are used for.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from orchestrator.errors import SpecError

PREFIX = "PENSTOCK_"


def _cache_dir(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", ".")) / ".cache")
    return Path(home) / "penstock"


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; the field `x_y` is the variable `PENSTOCK_X_Y`. Durations are seconds."""

    database_url: str = "sqlite:///penstock.db"
    broker_url: str = "memory://"
    models_dir: Path = Path("models")
    cache_dir: Path = Path(".cache/penstock")
    slots: int = 0
    threads: int = 0
    max_context: int = 4096
    max_stall_ms: int = 250
    memory_percent: int = 80
    prefix_cache_mib: int = 512
    deterministic: bool = False
    lease_seconds: float = 30.0
    flush_seconds: float = 0.25
    poll_seconds: float = 1.0
    grace_seconds: float = 20.0
    stall_seconds: float = 300.0
    template_seconds: float = 2.0
    log: str = "warning"
    files_dir: Path = Path("files")
    input_roots: str = ""
    max_body_mib: int = 16
    max_upload_mib: int = 200
    max_batch_lines: int = 50_000
    max_requests: int = 1_000_000
    max_total_tokens: int = 0
    max_choices: int = 128
    max_streams: int = 1000
    rate_per_minute: int = 0
    chat_flush_seconds: float = 0.04
    chat_priority: int = 1000
    webhook_private: bool = False
    prices: str = ""
    openai_compatible: bool = True

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "Settings":
        """Settings from `environ` (the process's by default).

        Raises SpecError, naming the variable, for an unknown name with the prefix and for a
        value of the wrong kind.
        """
        environ = os.environ if environ is None else environ
        known = {PREFIX + field.name.upper(): field.name for field in fields(cls)}
        values: dict[str, object] = {"cache_dir": _cache_dir(environ)}
        for variable in sorted(name for name in environ if name.startswith(PREFIX)):
            if variable not in known:
                raise SpecError(variable, _suggestion(variable, list(known)), "an unknown setting")
            values[known[variable]] = _parse(variable, known[variable], environ[variable])
        return cls(**values)  # type: ignore[arg-type]


def _suggestion(variable: str, known: list[str]) -> str:
    close = difflib.get_close_matches(variable, known, n=1)
    return f"{close[0]} perhaps" if close else "one of " + ", ".join(known)


_WHOLE = {
    "slots": (0, 4096),
    "threads": (0, 4096),
    "max_context": (16, 2**31 - 1),
    "max_stall_ms": (1, 86_400_000),
    "memory_percent": (1, 100),
    "prefix_cache_mib": (0, 2**31 - 1),
    "max_body_mib": (1, 1024),
    "max_upload_mib": (1, 1_048_576),
    "max_batch_lines": (1, 1_000_000),
    "max_requests": (1, 1_000_000),
    "max_total_tokens": (0, 2**63 - 1),
    "max_choices": (1, 128),
    "max_streams": (1, 1_000_000),
    "rate_per_minute": (0, 1_000_000),
    "chat_priority": (0, 2**31 - 1),
}
_FLAGS = ("deterministic", "webhook_private", "openai_compatible")
_MAY_BE_EMPTY = ("input_roots", "prices")
_SECONDS = (
    "lease_seconds",
    "flush_seconds",
    "poll_seconds",
    "grace_seconds",
    "stall_seconds",
    "template_seconds",
    "chat_flush_seconds",
)
_LEVELS = ("debug", "info", "warning", "error")


def _parse(variable: str, name: str, text: str) -> object:
    if name in _WHOLE:
        least, most = _WHOLE[name]
        if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
            raise SpecError(variable, f"a whole number from {least} to {most}", repr(text))
        return int(text)
    if name in _FLAGS:
        if text not in ("0", "1"):
            raise SpecError(variable, "0 or 1", repr(text))
        return text == "1"
    if name in _SECONDS:
        return _seconds(variable, text)
    if name == "log" and text not in _LEVELS:
        raise SpecError(variable, "one of " + ", ".join(_LEVELS), repr(text))
    if not text and name not in _MAY_BE_EMPTY:
        raise SpecError(variable, "a value", "an empty text")
    return Path(text) if name.endswith("_dir") else text


def _seconds(variable: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < 86_400:
        raise SpecError(variable, "seconds, more than 0 and less than a day", repr(text))
    return value
