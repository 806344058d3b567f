"""How values are shown on a page: text made safe to look at, numbers, times, bars.

Model output and names may hold anything. Escaping is the templates' (autoescape); what is done here
is that nothing is invisible or turns the text around it: control characters, marks that change the
direction of writing and characters without width become little signs. Knows nothing of routes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime

from markupsafe import Markup, escape

# Controls but newline and tab, marks of direction, what has no width (joiners of emoji and scripts
# stay), separators of lines that are none, tags, surrogates.
_UNSEEN = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_FEW = 40


def visible(text: object) -> Markup:
    """The text escaped, each unseen character as a sign that says which it is."""
    return Markup("").join(_pieces(str(text)))


def _pieces(text: str) -> Iterator[Markup]:
    at = 0
    for found in _UNSEEN.finditer(text):
        yield escape(text[at : found.start()])
        yield Markup('<span class="unseen">{}</span>').format(_sign(found[0]))
        at = found.end()
    yield escape(text[at:])


def _sign(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return f"U+{code:04X}"


def plain(text: object, limit: int = 200) -> str:
    """One line for titles and labels: unseen characters as `?`, cut after `limit`."""
    line = _UNSEEN.sub("?", str(text)).replace("\n", " ").replace("\t", " ")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def compact(value: object, limit: int = _FEW) -> str:
    """A parameter's value on one line: texts as they are, everything else as JSON."""
    if isinstance(value, str):
        return plain(value, limit) if value else '""'
    return plain(json.dumps(value, ensure_ascii=False, separators=(", ", ": ")), limit)


def pretty(value: object) -> str:
    """JSON over several lines."""
    return json.dumps(value, ensure_ascii=False, indent=2, default=str)


def number(value: float | None) -> str:
    """`12,345`, or `0.42` with at most three figures behind the point; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001 (the dash is meant)
    if float(value).is_integer():
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 10 else f"{value:.1f}"


def short(value: float | None) -> str:
    """`980`, `12.3k`, `4.56M`: for narrow columns."""
    if value is None or abs(value) < 10_000:
        return number(value)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return number(value)


def duration(seconds: float | None) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`: two units at most; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return "–"  # noqa: RUF001
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(part for part in parts[:2] if part)


def instant(at: datetime | None) -> Markup:
    """A `<time>` in UTC; the page's script shows it in the reader's own zone."""
    if at is None:
        return Markup("–")  # noqa: RUF001
    at = at.astimezone(UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(
        at.isoformat(timespec="milliseconds"), f"{at:%Y-%m-%d %H:%M:%S}"
    )


def since(begin: datetime | None, end: datetime | None) -> float | None:
    """Seconds from one to the other, to now while there is no end; None before the beginning."""
    if begin is None:
        return None
    return max(0.0, ((end or datetime.now(UTC)) - begin).total_seconds())


def heat(logprob: float) -> int:
    """How likely a token was, in six steps: 0 certain, 5 hardly believed."""
    for step, least in enumerate((0.9, 0.7, 0.4, 0.15, 0.03)):
        if logprob >= math.log(least):
            return step
    return 5


def percent(logprob: float) -> str:
    """A log-probability as a share of 100."""
    share = 100 * math.exp(min(0.0, logprob))
    return f"{share:.1f}%" if share >= 0.1 else "<0.1%"
