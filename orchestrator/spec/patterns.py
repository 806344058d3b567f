"""Regular expressions that people write into a job: whether they can be compiled safely.

Patterns run in the `regex` package: its syntax is that of `re`, which people know, and a search
takes a time limit, which `re` does not; an engine without backtracking (RE2) would refuse
look-around and back-references. Searching is bounded by time, compiling here, by size.
Knows nothing of jobs or texts.
"""

from functools import lru_cache

import regex

MAX_PATTERN = 2_000
MAX_EXPANSION = 100_000

_ATOM = regex.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]|\{(?P<low>\d*)(?:,(?P<high>\d*))?\}|.", regex.DOTALL
)


def compile_pattern(text: str, *, ignore_case: bool = False) -> regex.Pattern[str]:
    """The compiled pattern; raises ValueError with the reason if `pattern_fault` has one."""
    if fault := pattern_fault(text):
        raise ValueError(fault)
    return _compiled(text, ignore_case)


def pattern_fault(text: str) -> str | None:
    """Why `text` is no regular expression that can be compiled safely; None if it is one."""
    if len(text) > MAX_PATTERN:
        return f"longer than {MAX_PATTERN} characters"
    if _expansion(text) > MAX_EXPANSION:
        return f"its repeats written out are more than {MAX_EXPANSION} atoms"
    try:
        _compiled(text, False)
    except RecursionError:
        return "nested too deeply"
    except (regex.error, OverflowError, ValueError) as error:
        return str(error)
    return None


@lru_cache(maxsize=1024)
def _compiled(text: str, ignore_case: bool) -> regex.Pattern[str]:
    return regex.compile(text, regex.IGNORECASE if ignore_case else 0)


def _expansion(pattern: str) -> int:
    """About how many atoms the pattern is with every `{n}` written out.

    Compiling needs memory in proportion, and `((a{1000}){1000}){1000}` is 24 characters long.
    """
    groups, last = [0], 0
    for token in _ATOM.finditer(pattern):
        text = token.group()
        if token["low"] or token["high"]:
            times = int(token["high"] or token["low"])
            groups[-1] += last * (times - 1)
            last *= times
        elif text == "(":
            groups.append(0)
        elif text == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif text not in "?*+|":
            last = 1
            groups[-1] += 1
    return sum(groups)
