"""The active slots are always 0..B-1, whoever leaves."""

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.slots import Slots


class Seat:
    pass


@given(st.lists(st.integers(min_value=-1, max_value=7), max_size=60))
def test_seats_are_contiguous_and_moves_name_the_last_slot(moves: list[int]) -> None:
    slots: Slots[Seat] = Slots(5)
    memory: dict[int, Seat] = {}
    for move in moves:
        if move < 0 and slots.free:
            seat = Seat()
            memory[slots.sit(seat)] = seat
        elif 0 <= move < len(slots.seats):
            left = slots.seats[move]
            moved = slots.leave(left)
            if moved is not None:
                source, target = moved
                assert (source, target) == (len(slots.seats), move)
                memory[target] = memory[source]
        assert [memory[i] for i in range(len(slots.seats))] == slots.seats
        assert slots.free == 5 - len(slots.seats)
