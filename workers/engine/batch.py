"""The running batch: whose KV lies in which row, how much room is left, and the moves of the rows.

Every seat reserves what its choice may come to hold. Knows nothing of prompts on their way, of
sampling or of who waits.
"""

from collections.abc import Sequence

from workers.engine.protocols import TokenRunner
from workers.engine.seats import Admitted, Seat
from workers.engine.slots import Slots


class Batch:
    """Rows 0..B-1 of a runner; the engine's thread owns them."""

    def __init__(self, runner: TokenRunner) -> None:
        self._runner = runner
        self._slots: Slots[Seat] = Slots(runner.slots)

    @property
    def slots(self) -> int:
        """Rows that there may be."""
        return self._slots.count

    @slots.setter
    def slots(self, count: int) -> None:
        self._slots.count = count

    @property
    def seats(self) -> Sequence[Seat]:
        """Who is seated, by row."""
        return self._slots.seats

    @property
    def free(self) -> int:
        """Rows that are free."""
        return self._slots.free

    @property
    def free_tokens(self) -> int:
        """Tokens that rows may hold beside what those seated may come to."""
        return self._runner.capacity - sum(seat.admitted.tokens for seat in self.seats)

    def fits(self, admitted: Admitted) -> bool:
        """One more of its choices has room."""
        return bool(self.free) and admitted.tokens <= self.free_tokens

    def holder(self, key: bytes) -> int | None:
        """A row that begins with the prompt `key`."""
        rows = enumerate(self.seats)
        return next((row for row, seat in rows if seat.admitted.key == key), None)

    def sit(self, seat: Seat) -> int:
        """Take the next row and return it; nothing is in it yet."""
        return self._slots.sit(seat)

    def leave(self, seat: Seat) -> None:
        """Free a row; the last one moves into the hole."""
        move = self._slots.leave(seat)
        if move is not None:
            source, target = move
            self._runner.copy(source, target, self.seats[target].length)
        self._runner.trim(len(self.seats), 0)

    def clear(self) -> None:
        """Free all rows."""
        while self.seats:
            self._slots.leave(self.seats[-1])
            self._runner.trim(len(self.seats), 0)
