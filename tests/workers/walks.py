"""Random completions under a grammar, and texts in random tokens; helpers of the tests."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.grammars.constraint import Grammar, Mask
from workers.words.calls import CallFormat
from workers.words.text import Call, TextStream
from workers.words.tokenizer import Tokenizer


@dataclass(frozen=True)
class Walk:
    """A finished or cut completion: its tokens, and why it ended (`eos`, `ended`, `length`)."""

    tokens: tuple[int, ...]
    end: str
    text: str
    calls: tuple[Call, ...]


def allowed(mask: Mask | None, size: int) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones(size, bool)
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool)


def closers(tokenizer: Tokenizer) -> NDArray[np.float64]:
    """One for each token that may close a string, an array or an object, zero for the others."""
    starts = [tokenizer.token_bytes(id)[:1] for id in range(tokenizer.vocab_size)]
    return np.array([float(start != b"" and start in b'"]}') for start in starts])


def walk(
    tokenizer: Tokenizer,
    eos: frozenset[int],
    grammar: Grammar,
    form: CallFormat | None,
    seed: int,
    limit: int = 400,
    bias: NDArray[np.float64] | None = None,
) -> Walk:
    """The most probable allowed token of random logits, which lean to closing ever more."""
    rng, lean = np.random.default_rng(seed), closers(tokenizer)
    matcher = grammar.matcher()
    stream = form.stream(tokenizer) if form else TextStream(tokenizer)
    tokens: list[int] = []
    end = "length"
    while len(tokens) < limit and end == "length":
        logits = rng.normal(size=tokenizer.vocab_size) * 2 + lean * (1.5 + len(tokens) / 12)
        logits += 0 if bias is None else bias
        logits[~allowed(matcher.mask(), tokenizer.vocab_size)] = -np.inf
        token = int(logits.argmax())
        assert logits[token] > -np.inf, "no token is allowed, and the text has not ended"
        if token in eos:
            end = "eos"
            break
        stream.push(token)
        matcher.advance(token)
        tokens.append(token)
        if matcher.ended:
            end = "ended"
    stream.finish()
    return Walk(tuple(tokens), end, stream.text, stream.calls)


@functools.cache
def _spellings(tokenizer: Tokenizer) -> tuple[dict[bytes, list[int]], int]:
    """The tokens by what they spell, special ones too, and the longest spelling."""
    ids: dict[bytes, list[int]] = {}
    for id in range(tokenizer.vocab_size):
        spelled = tokenizer.token_bytes(id) or tokenizer.token(id).encode()
        ids.setdefault(spelled, []).append(id)
    return ids, max(map(len, ids))


def random_tokens(tokenizer: Tokenizer, data: bytes, rng: random.Random) -> list[int]:
    """Tokens that spell `data`, each drawn from those that go on with it; markers may be one."""
    ids, longest = _spellings(tokenizer)
    found: list[int] = []
    while data:
        ends = [end for end in range(1, min(len(data), longest) + 1) if data[:end] in ids]
        end = rng.choice(ends)
        found.append(rng.choice(ids[data[:end]]))
        data = data[end:]
    return found


def one_by_one(tokenizer: Tokenizer, data: bytes) -> Sequence[int]:
    """The tokens of single bytes."""
    ids, _ = _spellings(tokenizer)
    return [ids[data[at : at + 1]][0] for at in range(len(data))]
