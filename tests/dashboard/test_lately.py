"""What is told again: for ten times as long as reading took, by one reader."""

import threading
from itertools import count

import pytest

from orchestrator.api.dashboard.lately import Lately


def test_it_is_told_again_ten_times_as_long_as_reading_took() -> None:
    clock, reads = [0.0], count()
    lately = Lately[int](lambda: clock[0])

    def read() -> int:
        clock[0] += 2.0
        return next(reads)

    assert lately.tell("a", read) == 0  # until 2 + 20
    clock[0] = 21.9
    assert lately.tell("a", read) == 0
    assert lately.tell("b", read) == 1
    clock[0] = 22.0
    assert lately.tell("a", read) == 2


def test_of_many_who_ask_at_once_one_reads() -> None:
    lately, reads, begun, go = Lately[int](), count(1), threading.Event(), threading.Event()

    def read() -> int:
        begun.set()
        assert go.wait(30)
        return next(reads)

    told: list[int] = []
    asking = [
        threading.Thread(target=lambda: told.append(lately.tell("a", read))) for _ in range(8)
    ]
    asking[0].start()
    assert begun.wait(30)
    for each in asking[1:]:
        each.start()
    threading.Event().wait(0.05)  # reading took so long, and is told for ten times that
    go.set()
    for each in asking:
        each.join()
    assert told == [1] * 8


def test_what_is_raised_is_not_kept() -> None:
    lately = Lately[int]()
    with pytest.raises(ZeroDivisionError):
        lately.tell("a", lambda: 1 // 0)
    assert lately.tell("a", lambda: 7) == 7
