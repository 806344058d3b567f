"""KV of prompts that were computed before: whole prompts, and what they begin with, by blocks.

A tree of blocks of BLOCK tokens. A block is found by the tokens in it below the very block that
stood before it, compared one by one and not by a hash, so a hit has the same tokens from position 0
on. At the end of a prompt hangs a leaf with what is left of it and the logits of its last token: to
find it is to find the whole prompt. The least recently used go first, leaves before what they hang
on. Bounded in bytes.

Only what a prefill computed belongs here: a token computed by a decode step differs in its last
bits. Knows nothing of who asks, nor of rows.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from workers.engine.protocols import Block, Logits

BLOCK = 32
"""Tokens of a block: half of it, on average, is computed again at the end of what two share."""

_ITEM = np.dtype("<i4").itemsize
_BYTES = BLOCK * _ITEM
_OWN = 1024  # bytes that an entry holds beside its KV and logits, roughly
_Place = tuple[int, bytes, bool]  # the entry before, the tokens, and whether the prompt ends here
Read = Callable[[int, int], Block]
"""Positions [start, end) of the row in which the prompt was computed."""


def key_of(tokens: Sequence[int]) -> bytes:
    """A prompt as the cache knows it: little-endian int32."""
    return np.asarray(tokens, "<i4").tobytes()


@dataclass(frozen=True, slots=True)
class Piece:
    """KV of the positions from `start` on."""

    start: int
    block: Block


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole prompt: its KV in pieces, and the logits of its last token, float32 `[vocab]`."""

    pieces: tuple[Piece, ...]
    logits: Logits


@dataclass(frozen=True, slots=True)
class _Entry:
    id: int
    piece: Piece | None  # None: a prompt that ends where a block does
    logits: Logits | None
    nbytes: int


class Prefixes:
    """One engine's cache; its thread owns it."""

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` bytes; 0: nothing."""
        self.limit, self.held, self.evicted = limit, 0, 0
        # In order of use. Whoever uses an entry uses those before it too, the nearest to the root
        # last: so the first of all is always a leaf.
        self._entries: OrderedDict[_Place, _Entry] = OrderedDict()
        self._ids = count(1)

    def whole(self, key: bytes) -> Whole | None:
        """The prompt `key`, if all of it is here."""
        places, entries = self._walk(key)
        leaf = _leaf(key, entries)
        found = self._entries.get(leaf) if len(entries) == len(key) // _BYTES else None
        if found is None or found.logits is None:
            return None
        self._use([*places, leaf])
        pieces = [entry.piece for entry in (*entries, found) if entry.piece is not None]
        return Whole(tuple(pieces), found.logits)

    def longest(self, key: bytes) -> tuple[Piece, ...]:
        """What is here of the beginning of `key`, as long as it leaves two tokens to compute."""
        most = max(0, len(key) // _ITEM - 2) // BLOCK
        places, entries = self._walk(key, most)
        self._use(places)
        return tuple(entry.piece for entry in entries if entry.piece is not None)

    def add(self, key: bytes, done: int, read: Read, logits: Logits | None = None) -> None:
        """Take what is missing of the first `done` tokens of `key`; with `logits`, to its end.

        Where there is no room for all of it, the beginning stays.
        """
        if not self.limit:
            return
        places, entries = self._walk(key, done // BLOCK)
        self._use(places)
        for index in range(len(entries), done // BLOCK):
            start = index * BLOCK
            place = (_id(entries), key[index * _BYTES : (index + 1) * _BYTES], False)
            entry = self._entry(Piece(start, read(start, start + BLOCK)))
            if not self._insert(place, entry, places):
                logits = None
                break
            places.append(place)
            entries.append(entry)
        if logits is not None:
            self._end(_leaf(key, entries), done, read, logits, places)
        self._use(places)

    def _end(
        self, leaf: _Place, length: int, read: Read, logits: Logits, path: list[_Place]
    ) -> None:
        """Hang the end of a prompt of `length` tokens behind `path`."""
        if leaf not in self._entries:
            start = length - length % BLOCK
            rest = Piece(start, read(start, length)) if length > start else None
            if not self._insert(leaf, self._entry(rest, logits), path):
                return
        path.append(leaf)

    def clear(self) -> None:
        """Give all memory back."""
        self._entries.clear()
        self.held = 0

    def _walk(self, key: bytes, most: int | None = None) -> tuple[list[_Place], list[_Entry]]:
        """The blocks from the root on that are here, at most so many."""
        places: list[_Place] = []
        entries: list[_Entry] = []
        for index in range(len(key) // _BYTES if most is None else most):
            place = (_id(entries), key[index * _BYTES : (index + 1) * _BYTES], False)
            entry = self._entries.get(place)
            if entry is None:
                break
            places.append(place)
            entries.append(entry)
        return places, entries

    def _use(self, places: Sequence[_Place]) -> None:
        for place in reversed(places):
            self._entries.move_to_end(place)

    def _entry(self, piece: Piece | None, logits: Logits | None = None) -> _Entry:
        kv = 0 if piece is None else piece.block.nbytes
        row = 0 if logits is None else logits.nbytes
        return _Entry(next(self._ids), piece, logits, _OWN + kv + row)

    def _insert(self, place: _Place, entry: _Entry, path: Sequence[_Place]) -> bool:
        """Whether there was room, without giving up what `entry` hangs on."""
        while self.held + entry.nbytes > self.limit:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest in path:
                return False
            self.held -= self._entries.pop(oldest).nbytes
            self.evicted += 1
        self._entries[place] = entry
        self.held += entry.nbytes
        return True


def _id(entries: Sequence[_Entry]) -> int:
    """Below which entry the next one hangs; 0: the root."""
    return entries[-1].id if entries else 0


def _leaf(key: bytes, entries: Sequence[_Entry]) -> _Place:
    return (_id(entries), key[len(entries) * _BYTES :], True)
