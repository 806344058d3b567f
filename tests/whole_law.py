"""The law of a draw (workers/drawing/kernels.py) by a sort of the whole row: a referee.

In plain numpy, written from the law's text; shares no code with what it judges but the seven
coefficients.
"""

import math

import numpy as np
from numpy.typing import NDArray

from workers.drawing.drawing_graph import POWERS

_C = [np.float32(c) for c in POWERS]


def weights(x: NDArray[np.float32], temperature: float) -> NDArray[np.int64]:
    """A whole number of 0 .. 2**44 for each logit."""
    factor = math.log2(math.e) / temperature
    high = np.float32(factor)
    low = np.float32(factor - float(high))
    with np.errstate(over="ignore"):
        gap = np.maximum(x - x.max(), np.float32(-60 / factor))
    s = gap * high
    n = np.rint(s)
    r = (s - n) + gap * low
    p = np.full_like(gap, _C[6])
    for c in _C[5::-1]:
        p = p * r + c
    exact = (p * np.exp2(n + np.float32(44))).astype(np.float64)
    return np.rint(exact).astype(np.int64)


def mass(x: NDArray[np.float32], temperature: float) -> tuple[NDArray[np.intp], list[int]]:
    """Tokens by (logit descending, id) and the running sums of their weights."""
    order = np.lexsort((np.arange(x.size), -x))
    return order, np.cumsum(weights(x, temperature)[order]).tolist()


def kept(sums: list[int], top_p: float) -> int:
    """The mass of the nucleus."""
    if top_p >= 1:
        return sums[-1]
    need = min(max(1, math.ceil(top_p * float(sums[-1]))), sums[-1])
    return next(c for c in sums if c >= need)


def drawn(x: NDArray[np.float32], temperature: float, top_p: float, u: float) -> int:
    """The token of a row of finite largest logit."""
    if temperature < 1e-5 or top_p == 0:
        return int(x.argmax())
    order, sums = mass(x, temperature)
    whole = kept(sums, top_p)
    target = min(int(u * float(whole)), whole - 1)
    return int(order[int(np.searchsorted(np.array(sums), target, "right"))])
