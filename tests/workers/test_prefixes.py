"""The cache of prompts: what it gives was put in under the very same tokens; it has its bound."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.prefixes import BLOCK, Piece, Prefixes, Read, key_of
from workers.engine.protocols import Logits

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """KV that knows the tokens it was computed from, all of them."""

    tokens: Tokens
    start: int

    @property
    def nbytes(self) -> int:
        return 1000 * (len(self.tokens) - self.start)


def reader(prompt: Tokens) -> Read:
    return lambda start, end: Made(prompt[:end], start)


def logits(prompt: Tokens) -> Logits:
    return np.asarray([hash(prompt) % 1000, len(prompt)], np.float32)


def add(cache: Prefixes, prompt: Tokens, done: int | None = None) -> None:
    whole = done is None
    end = logits(prompt) if whole else None
    cache.add(key_of(prompt), len(prompt) if done is None else done, reader(prompt), end)


def covered(pieces: tuple[Piece, ...], prompt: Tokens) -> int:
    """How many tokens the pieces hold; each is of this prompt, and they have no gap."""
    position = 0
    for piece in pieces:
        block = piece.block
        assert isinstance(block, Made)
        assert piece.start == block.start == position
        assert block.tokens == prompt[: len(block.tokens)]
        position = len(block.tokens)
    return position


PROMPTS = st.builds(
    lambda common, length, own: tuple((common + i) % 3 for i in range(length)) + own,
    st.integers(0, 2),
    st.integers(0, 3 * BLOCK + 1),
    st.lists(st.integers(0, 1), max_size=BLOCK + 2).map(tuple),
).filter(bool)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.booleans()), max_size=30), st.integers(0, 400_000))
def test_whatever_is_put_in_what_comes_out_is_of_the_same_tokens(
    prompts: list[tuple[Tokens, bool]], limit: int
) -> None:
    cache = Prefixes(limit)
    for prompt, part in prompts:
        longest = covered(cache.longest(key_of(prompt)), prompt)
        assert longest % BLOCK == 0 and longest <= max(0, len(prompt) - 2)
        whole = cache.whole(key_of(prompt))
        if whole is not None:
            assert covered(whole.pieces, prompt) == len(prompt)
            assert (whole.logits == logits(prompt)).all()
        add(cache, prompt, len(prompt) // 2 if part else None)
        assert 0 <= cache.held <= limit
    assert (cache.held == 0) == (not cache._entries)
    ids = {entry.id for entry in cache._entries.values()}
    assert all(parent == 0 or parent in ids for parent, _, _ in cache._entries), "a lost root"
    cache.clear()
    assert cache.held == 0 and all(cache.whole(key_of(prompt)) is None for prompt, _ in prompts)


def test_with_room_for_all_nothing_is_forgotten() -> None:
    cache = Prefixes(10**9)
    prompts = [tuple(range(i, i + length)) for i in range(5) for length in (1, 31, 32, 33, 100)]
    for prompt in prompts:
        add(cache, prompt)
    for prompt in prompts:
        assert cache.whole(key_of(prompt)) is not None
        longer = (*prompt, 500, 501)
        shared = len(prompt) // BLOCK * BLOCK
        assert covered(cache.longest(key_of(longer)), longer) == shared
    assert cache.evicted == 0


@pytest.mark.parametrize("tail", [0, 1, 2, 3])
def test_a_hit_leaves_two_tokens_to_compute(tail: int) -> None:
    cache = Prefixes(10**9)
    prompt = tuple(range(2 * BLOCK + tail))
    add(cache, (*prompt, 9, 9, 9))
    expected = 2 * BLOCK if tail >= 2 else BLOCK
    assert covered(cache.longest(key_of(prompt)), prompt) == expected


def test_the_least_recently_used_go_first_and_ends_before_beginnings() -> None:
    common = tuple(range(BLOCK))
    one, two, other = (*common, 1), (*common, 2), tuple(range(500, 500 + BLOCK))
    cache = Prefixes(3 * 1000 * BLOCK)
    add(cache, one)
    add(cache, other)
    add(cache, two)
    assert cache.whole(key_of(one)) is not None  # it is used, and with it the common beginning
    add(cache, tuple(range(900, 900 + BLOCK)))  # makes room: the oldest is `other`
    assert cache.whole(key_of(other)) is None
    assert cache.whole(key_of(one)) is not None
    assert cache.evicted > 0


def test_a_prompt_that_has_no_room_leaves_its_beginning() -> None:
    cache = Prefixes(2 * (1000 * BLOCK + 2000))
    prompt = tuple(range(5 * BLOCK))
    add(cache, prompt)
    assert covered(cache.longest(key_of(prompt)), prompt) == 2 * BLOCK
    assert cache.whole(key_of(prompt)) is None


def test_a_cache_of_no_size_holds_nothing_and_reads_nothing() -> None:
    def unread(start: int, end: int) -> Made:
        raise AssertionError("nobody asked for it")

    cache = Prefixes(0)
    cache.add(key_of((1, 2, 3)), 3, unread, logits((1, 2, 3)))
    assert cache.whole(key_of((1, 2, 3))) is None and cache.longest(key_of((1,) * 99)) == ()
