"""A job's section `limits` to values: what it may cost, how much at once, until when.

Knows nothing of who keeps them (`orchestrator.db`), nor of any clock.
"""

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from orchestrator.spec.document import Document
from orchestrator.spec.params import INT64
from orchestrator.spec.refusals import show

KEYS = ("max_total_tokens", "max_parallel", "deadline", "max_attempts")
MAX_ATTEMPTS = 5
_MOST_ATTEMPTS = 1000
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 10 * 366 * 86400
_INT32 = 2**31


@dataclass(frozen=True, slots=True)
class Limits:
    """What the job may cost at most; None = no limit.

    `max_parallel`: requests running at once. `max_attempts`: attempts in a row that a worker's
    error may end without one new token. `deadline`: seconds from the submission on;
    `deadline_at`: the same as an instant, ISO 8601 with its zone. One of the two at most.
    """

    max_total_tokens: int | None = None
    max_parallel: int | None = None
    deadline: float | None = None
    deadline_at: str | None = None
    max_attempts: int = MAX_ATTEMPTS

    def content(self) -> dict[str, object]:
        """What a digest is made of: limits that are not given leave no trace in it."""
        none, mine = asdict(Limits()), asdict(self)
        given = {key: value for key, value in mine.items() if value != none[key]}
        return {"max_total_tokens": self.max_total_tokens} | given


def read(document: Document, value: object) -> Limits:
    """The section `limits`. Raises SpecError with its place in the file."""
    section = document.mapping(("limits",), value, KEYS)
    if not section:
        raise document.refusal(("limits",), f"one of the keys {', '.join(KEYS)}", "none")
    most = {
        "max_total_tokens": INT64 - 1,
        "max_parallel": _INT32 - 1,
        "max_attempts": _MOST_ATTEMPTS,
    }
    whole = {
        key: document.integer(("limits", key), section[key], 1, high)
        for key, high in most.items()
        if key in section
    }
    seconds, instant = None, None
    if "deadline" in section:
        seconds, instant = _deadline(document, section["deadline"])
    return Limits(
        whole.get("max_total_tokens"),
        whole.get("max_parallel"),
        seconds,
        instant,
        whole.get("max_attempts", MAX_ATTEMPTS),
    )


def _deadline(document: Document, given: object) -> tuple[float | None, str | None]:
    """(seconds, None) or (None, an instant)."""
    seconds = None if isinstance(given, bool) else given
    if isinstance(given, str):
        if found := _DURATION.fullmatch(given):
            seconds = float(found[1]) * _SECONDS[found[2]]
        elif instant := _instant(given):
            return None, instant
    if isinstance(seconds, int | float) and 0 < seconds <= _LONGEST:
        return float(seconds), None
    expected = (
        "seconds, a time like '45s', '30m', '2h' or '1d' up to ten years, or an instant "
        "with its zone like '2030-01-31T18:00:00Z'"
    )
    raise document.refusal(("limits", "deadline"), expected, show(given))


def _instant(text: str) -> str | None:
    """The instant in UTC, or None where it is none or has no zone."""
    try:
        at = datetime.fromisoformat(text)
        return at.astimezone(UTC).isoformat() if at.tzinfo else None
    except (ValueError, OverflowError):
        return None
