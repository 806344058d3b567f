"""Prompts on their way to their slots: found in the cache, computed in chunks or several together.

A prompt is computed in a staging row, from where the longest beginning that the cache has ends, and
copied to the slots of its choices when it is whole. One is computed at a time, in the order of the
queue, so whoever has the same prompt, or shares its beginning, comes later and finds it. Short ones
of which nothing is known go together, in one call.

Knows nothing of sampling, of slots but their numbers, nor of what is generated.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from workers.engine.pace import Pace, chunk
from workers.engine.prefixes import BLOCK, Piece, Prefixes
from workers.engine.protocols import Logits, TokenRunner
from workers.engine.seats import Admitted

SHORT = 64
"""Tokens of a prompt that goes with others: a longer one fills a call by itself."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A prompt's KV, in a row or in pieces, and the logits of its last token `[vocab]`."""

    logits: Logits
    row: int | None = None
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompted:
    """Prompts so far: their tokens, those that were not computed; and the cache they came from."""

    tokens: int
    cached: int
    held_bytes: int
    evicted: int


class Prefilling:
    """One engine's staging rows; its thread owns them."""

    def __init__(
        self,
        runner: TokenRunner,
        prefixes: Prefixes,
        pace: Pace,
        tell: Callable[[Admitted, int], None],
    ) -> None:
        """`tell` is told, before anything is computed, who begins and how many tokens it found."""
        self._runner, self._prefixes, self._pace, self._tell = runner, prefixes, pace, tell
        self.begun: list[Admitted] = []
        """Whose prompt is on its way: half computed, or whole and not yet where it is wanted."""

    def ready(
        self, admitted: Admitted, holder: int | None, followers: Iterable[Admitted]
    ) -> Computed | None:
        """The prompt of `admitted`, computed as far as this step may; None: it is not whole yet.

        `holder`: a slot whose choice has the same prompt. `followers`: who could sit down next.
        """
        if admitted.row is None:
            found = self._find(admitted, holder)
            if found is not None:
                return found
            if not self._pace.room():
                return None
            self._begin(admitted, followers)
        while not admitted.whole:
            room = self._pace.room()
            if not room:
                return None
            self._extend(admitted, self._part(room, admitted.length - admitted.done))
        assert admitted.logits is not None  # noqa: S101  it is whole
        return Computed(admitted.logits, admitted.row)

    def fill(self, slot: int, computed: Computed, length: int) -> Computed:
        """Put a prompt of `length` tokens into a slot; where it may be copied from next."""
        if computed.row is not None:
            self._runner.copy(computed.row, slot, length)
            return computed
        for piece in computed.pieces:
            self._runner.write(slot, piece.start, piece.block)
        return replace(computed, row=slot, pieces=())

    def leave(self, admitted: Admitted) -> None:
        """Its prompt lies where it is wanted, or is not wanted: its staging row is free."""
        if admitted in self.begun:
            self.begun.remove(admitted)
        if admitted.row is not None:
            self._runner.trim(admitted.row, 0)
            admitted.row, admitted.done = None, 0

    def _find(self, admitted: Admitted, holder: int | None) -> Computed | None:
        known = self._prefixes.whole(admitted.key)
        if known is not None and admitted.logits is None:
            admitted.logits = known.logits
        if admitted.logits is None or (known is None and holder is None):
            return None
        self.begun = [admitted]
        self._tell(admitted, admitted.length)
        return Computed(admitted.logits, holder, () if known is None else known.pieces)

    def _begin(self, admitted: Admitted, followers: Iterable[Admitted]) -> None:
        pieces = self._pieces(admitted)
        group = [admitted] if pieces else self._group(admitted, followers)
        self.begun = group
        for place, each in enumerate(group):
            each.row, each.done = self._runner.slots + place, 0
            self._tell(each, len(pieces) * BLOCK)
        if len(group) > 1:
            self._together(group)
        for piece in pieces:
            self._runner.write(self._runner.slots, piece.start, piece.block)
        if pieces:
            admitted.done = len(pieces) * BLOCK

    def _pieces(self, admitted: Admitted) -> tuple[Piece, ...]:
        """Of what the cache has of its beginning, as much as ends where the next part may begin."""
        pieces = self._prefixes.longest(admitted.key)
        while len(pieces) * BLOCK % self._runner.grain:
            pieces = pieces[:-1]
        return pieces

    def _part(self, room: int, remaining: int) -> int:
        """Tokens of the next part of a prompt."""
        grain = self._runner.grain
        if grain == 1:
            return chunk(room, remaining)
        return min(remaining, max(grain, room - room % grain))

    def _group(self, first: Admitted, followers: Iterable[Admitted]) -> list[Admitted]:
        """Those behind `first` whose short prompts can be computed with it at once."""
        group, room = [first], self._pace.room()
        if not _is_short(first) or self._runner.grain > 1:
            return group
        for other in followers:
            longest = max(each.length for each in [*group, other])
            fits = len(group) < self._runner.staging and longest * (len(group) + 1) <= room
            if not fits or not _is_short(other) or self._knows(other, group):
                break
            group.append(other)
        return group

    def _knows(self, other: Admitted, group: list[Admitted]) -> bool:
        """Some of its prompt need not be computed, or will not when the group's are."""
        if any(_share(other, each) for each in group):
            return True
        whole = self._prefixes.whole(other.key)
        return whole is not None or bool(self._prefixes.longest(other.key))

    def _together(self, group: list[Admitted]) -> None:
        prompts = [each.completion.prompt for each in group]
        padded = len(prompts) * max(map(len, prompts))
        with self._pace.prompt(padded):
            logits = self._runner.prefill_together(self._runner.slots, prompts)
        for each, row in zip(group, logits, strict=True):
            each.done, each.logits = each.length, row.copy()  # each alone, not all or none
            self._keep(each)

    def _extend(self, admitted: Admitted, tokens: int) -> None:
        """The next `tokens` of its prompt."""
        row, start = admitted.row, admitted.done
        assert row is not None  # noqa: S101  it has begun
        part = admitted.completion.prompt[start : start + tokens]
        grain = self._runner.grain
        with self._pace.prompt(-(-tokens // grain) * grain):
            if start + tokens == admitted.length:
                admitted.logits = self._runner.prefill(row, part, start)
            else:
                self._runner.extend(row, part, start)
        admitted.done += tokens
        self._keep(admitted)

    def _keep(self, admitted: Admitted) -> None:
        row = admitted.row
        assert row is not None  # noqa: S101  something was computed there
        logits = admitted.logits if admitted.whole else None
        self._prefixes.add(
            admitted.key,
            admitted.done,
            lambda start, end: self._runner.read(row, start, end),
            logits,
        )


def _is_short(admitted: Admitted) -> bool:
    # A prompt of one token takes the path of a decode step: it is always computed alone.
    return 1 < admitted.length <= SHORT


def _share(one: Admitted, other: Admitted) -> bool:
    """The same prompt, or the same first block."""
    first = BLOCK * 4
    return one.key == other.key or (len(one.key) > first and one.key[:first] == other.key[:first])
