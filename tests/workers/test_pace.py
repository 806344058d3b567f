"""How prompts are cut, and how much of them a step computes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.workers.timed_runner import Clock
from workers.engine.pace import IDLE_SECONDS, LARGEST, LEAST, Pace, chunk


@example(17, 16)
@given(st.integers(1, 3000), st.integers(LEAST, LARGEST))
def test_a_prompt_is_cut_into_parts_that_fit_and_none_is_of_one_token(
    length: int, room: int
) -> None:
    remaining, parts = length, []
    while remaining:
        parts.append(chunk(room, remaining))
        remaining -= parts[-1]
    assert sum(parts) == length and max(parts) <= room + 1
    assert min(parts) >= 2 or parts == [1]
    assert len(parts) <= -(-length // (room - room % 16 or room)) + 1


def spend(pace: Pace, clock: Clock, tokens: int, seconds: float) -> None:
    with pace.prompt(tokens):
        clock.now += seconds


def test_beside_running_rows_the_first_guess_is_careful_and_measures_replace_it() -> None:
    clock = Clock()
    pace = Pace(0.25, clock)
    pace.begin(running=True)
    assert pace.room() == LEAST
    spend(pace, clock, LEAST, 0.016)  # a millisecond a token
    for _ in range(12):
        pace.begin(running=True)
        spend(pace, clock, 100, 0.1)
    pace.begin(running=True)
    assert 150 <= pace.room() <= 200
    spend(pace, clock, 100, 0.4)
    pace.begin(running=True)
    assert pace.room() <= 50, "what is slower counts at once"


def test_the_decode_call_and_what_the_step_has_spent_are_taken_off() -> None:
    clock = Clock()
    pace = Pace(0.25, clock)
    for _ in range(12):
        pace.begin(running=True)
        spend(pace, clock, 100, 0.1)
    pace.begin(running=True)
    before = pace.room()
    pace.decoded(0.05)
    assert before - pace.room() in range(40, 61)
    clock.now += 0.1
    assert pace.room() <= before - 140
    clock.now += 1
    assert pace.room() == LEAST, "however late: a little in every step"
    spend(pace, clock, LEAST, 0.01)
    assert pace.room() == 0


@pytest.mark.parametrize("bound", [0.05, 5.0])
def test_with_nobody_running_a_step_takes_about_a_second(bound: float) -> None:
    clock = Clock()
    pace = Pace(bound, clock)
    for _ in range(10):
        pace.begin(running=False)
        spend(pace, clock, 100, 0.5)
    pace.begin(running=False)
    limit = max(IDLE_SECONDS, bound)
    assert 0.9 * limit <= pace.room() * 0.005 <= 1.05 * limit or pace.room() == LARGEST


def test_a_little_is_computed_in_every_step_and_more_where_it_is_worth_a_call() -> None:
    clock = Clock()
    pace = Pace(0.1125, clock, worth=64)
    for _ in range(20):
        pace.begin(running=True)
        spend(pace, clock, 100, 0.1)
    pace.begin(running=True)
    assert pace.room() == 80
    spend(pace, clock, 16, 0.016)
    assert pace.room() == 64
    spend(pace, clock, 16, 0.016)
    assert pace.room() == 0, "48 are not worth a call"
    slow = Pace(0.001, clock, worth=64)
    slow.begin(running=True)
    assert slow.room() == LEAST
