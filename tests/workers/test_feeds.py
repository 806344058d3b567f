"""Widths of prompt calls that leave no row of a block of attention alone."""

import pytest

from workers.running.feeds import SPARE, even_width

KIB = 1024


@pytest.mark.parametrize("head_size", [8, 16, 32, 64, 80, 96, 112, 128, 160, 192, 256, 512])
@pytest.mark.parametrize("cache", [256, 512, 1024, 1280, 2048])
def test_no_block_has_one_row(head_size: int, cache: int) -> None:
    """The size of a block as onnxruntime computes it, whatever the processor's second cache."""
    block = min(cache * KIB // (4 * 4 * 2 * head_size), 2 * head_size)
    for width in range(2, 3000):
        wide = even_width(width, head_size)
        assert width <= wide <= width + SPARE
        assert wide % block != 1 or block == 1


def test_one_token_and_most_widths_are_as_they_are() -> None:
    assert even_width(1, 64) == 1 and even_width(2, 64) == 2
    padded = [width for width in range(1, 1025) if even_width(width, 64) != width]
    assert 129 in padded and len(padded) <= 8
