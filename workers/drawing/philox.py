"""Random numbers that are functions of a seed, a choice and a position: no state, no order.

Knows nothing of logits or tokens.
"""

from functools import lru_cache

import numpy as np

_AHEAD = 32  # positions whose numbers are made together


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number of a choice's token at `position`: float64 in [0, 1), 53 bits.

    First output of Philox4x64-10 (Salmon et al. 2011, as in numpy) with the key
    (seed mod 2**64, choice) and the counter `position`.
    """
    return _numbers(seed % 2**64, choice, position // _AHEAD)[position % _AHEAD]


@lru_cache(maxsize=4096)
def _numbers(seed: int, choice: int, block: int) -> list[float]:
    """_AHEAD positions' numbers: a generator costs as much for one. Four outputs a counter."""
    key = np.array([seed, choice], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=block * _AHEAD).random_raw(4 * _AHEAD)[::4]
    numbers: list[float] = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers
