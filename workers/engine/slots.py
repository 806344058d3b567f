"""Who sits where: the active slots are always 0..B-1, so a decode step is a view of the first B.

Knows nothing of what a seat holds, nor of KV memory: `leave` says which slot's memory has to move.
"""

from typing import Generic, TypeVar

Seat = TypeVar("Seat")


class Slots(Generic[Seat]):
    """`count` slots, filled from the bottom; a hole is filled with the last seat."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seats: list[Seat] = []

    @property
    def free(self) -> int:
        """How many more seats there are."""
        return self.count - len(self.seats)

    def sit(self, seat: Seat) -> int:
        """Take the next slot and return its number; the caller has asked `free`."""
        if not self.free:
            raise RuntimeError(f"all {self.count} slots are taken")
        self.seats.append(seat)
        return len(self.seats) - 1

    def leave(self, seat: Seat) -> tuple[int, int] | None:
        """Free the slot of `seat`; `(source, target)` if the last seat moves into the hole."""
        hole, last = self.slot_of(seat), len(self.seats) - 1
        mover = self.seats.pop()
        if hole == last:
            return None
        self.seats[hole] = mover
        return last, hole

    def slot_of(self, seat: Seat) -> int:
        """The slot of `seat` (by identity); ValueError if it has none."""
        for slot, other in enumerate(self.seats):
            if other is seat:
                return slot
        raise ValueError("the seat is not in a slot")
