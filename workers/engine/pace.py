"""How many prompt tokens a step may compute, so that no running row waits too long for its next.

A step's prompts and its decode call together are to take no longer than the bound. What a prompt
token costs is measured as it goes: a slower one counts at once, a faster one by half, and for
chunks beside running rows apart from those with nobody running, which are larger and cheaper a
token. Knows nothing of prompts, rows or runners; seconds come from a clock that tests turn by hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

LEAST = 16
LARGEST = 512
"""Tokens of one call: beyond, the scratch memory of attention grows and nothing is gained."""
IDLE_SECONDS = 1.0
"""With nobody running: so that cancellations and leases are looked at."""

_FIRST_GUESS = 0.02  # seconds a token; a model of 7 billion parameters on two cores
_SHARE = 0.8  # of the bound: a measure of the past is not the future
_ROUND = 16  # rows that a matrix kernel takes at once


class Pace:
    """One engine's measure; its thread owns it."""

    def __init__(self, max_stall: float, clock: Callable[[], float], worth: int = LEAST) -> None:
        """`max_stall` in seconds; `worth`: tokens that are worth another call in the same step."""
        self._max_stall, self._clock, self._worth = max_stall, clock, worth
        self._cost = {True: _FIRST_GUESS, False: _FIRST_GUESS}  # seconds a token, by `running`
        self._decode = 0.0
        self._running, self._began, self._computed = False, 0.0, False

    def begin(self, running: bool) -> None:
        """A step begins, with rows that wait for their next token, or without."""
        self._running, self._began, self._computed = running, self._clock(), False

    def room(self) -> int:
        """Tokens that may be computed now; 0: the step has had its share."""
        seconds = self._clock() - self._began
        if self._running:
            left = self._max_stall * _SHARE - self._decode - seconds
        else:
            left = max(IDLE_SECONDS, self._max_stall) - seconds
        tokens = min(int(left / self._cost[self._running]), LARGEST)
        tokens -= tokens % _ROUND
        if self._computed:
            return tokens if tokens >= self._worth else 0
        return max(tokens, LEAST)  # however slow: a little in every step

    @contextmanager
    def prompt(self, tokens: int) -> Iterator[None]:
        """So many tokens, padding counted, are computed in the block."""
        began = self._clock()
        yield
        self._computed = True
        cost, known = (self._clock() - began) / tokens, self._cost[self._running]
        self._cost[self._running] = cost if cost > known else (cost + known) / 2

    def decoded(self, seconds: float) -> None:
        """The step's decode call took so long."""
        self._decode = seconds


def chunk(room: int, remaining: int) -> int:
    """Tokens of the next chunk of a prompt that has `remaining` left: even, none of one token.

    At most `room`, or one more where a single token would be left over.
    """
    if remaining <= room + 1:
        return remaining
    even = -(-remaining // -(-remaining // room))
    return min(room, -(-even // _ROUND) * _ROUND)
