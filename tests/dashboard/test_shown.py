"""What a value looks like on a page: nothing is markup, nothing is unseen."""

import math
import random
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from orchestrator.api.dashboard import shown


class _Read(HTMLParser):
    """The tags of some HTML, its text, and that of the signs apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text, self.signs, self.inside = "", "", False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.signs += data
        else:
            self.text += data


def test_any_text_stays_text_and_none_of_it_is_unseen() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    seen = "<script>&lt;'\"&#60; a\u05d0\u0645\n\t\U0001f469\u200d\U0001f680"
    unseen = "\0\x07\x1b\r\x7f\x85\xad\u200b\u200e\u202e\u2066\u2028\ufeff\U000e0041\ud800"
    for _ in range(500):
        text = "".join(dice.choice(seen + unseen) for _ in range(dice.randint(0, 40)))
        text = re.sub("\r+\n", "\n", text)  # the end of a line stays as it is
        read = _Read()
        read.feed(str(shown.visible(text)))
        read.close()
        assert read.tags <= {"span"}
        assert read.text == "".join(c for c in text if c in seen)
        assert read.signs.isprintable()
        assert bool(read.signs) == any(c in unseen for c in text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345, "12,345"),
        (0.5, "0.5"),
        (1 / 3, "0.333"),
        (12.34, "12.3"),
        (1e6, "1,000,000"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert shown.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.2 s"), (75, "1 min 15 s"), (3600, "1 h"), (90061, "1 d 1 h"), (59.7, "1 min")],
)
def test_durations(value: float, text: str) -> None:
    assert shown.duration(value) == text


def test_what_is_not_known_is_a_dash() -> None:
    dash = shown.number(None)
    assert dash == shown.duration(None) == shown.short(None) == str(shown.instant(None))
    assert shown.number(math.nan) == dash


def test_the_likelier_a_token_the_cooler_its_colour() -> None:
    logprobs = [0.0, -0.2, -0.5, -1.5, -3.0, -9.0, -math.inf]
    steps = [shown.heat(each) for each in logprobs]
    assert steps == [0, 1, 2, 3, 4, 5, 5]
    assert [shown.percent(each) for each in (0.0, -20.0)] == ["100.0%", "<0.1%"]


def test_an_instant_is_told_in_utc() -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
    wanted = '<time datetime="2026-01-02T03:04:05.678+00:00">2026-01-02 03:04:05 UTC</time>'
    assert str(shown.instant(at)) == wanted
