"""Batches to sample and two ways to do it: Penstock's sampler, and a full sort in plain numpy.

Makes vocabularies, logits and rows of the kinds that `sampler.py` compares. Knows nothing of
clocks, peers in other processes or tables.
"""

import itertools
import math
import string
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from workers.drawing.philox import uniform
from workers.drawing.sampler import HostSampler, Sampled, SamplerRow, Sampling
from workers.grammars.constraint import Grammar, Grammars, Matcher, Shape
from workers.words.tokenizer import Tokenizer

KINDS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0.0),
    "top_p 0.95": Sampling(top_p=0.95),
    "penalised": Sampling(
        frequency_penalty=0.5, presence_penalty=0.3, logit_bias=((5, 1.0), (7, -100.0))
    ),
    "logprobs 20": Sampling(logprobs=True, top_logprobs=20),
    "all of these": Sampling(
        top_p=0.95,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        logit_bias=((5, 1.0), (7, -100.0)),
        logprobs=True,
        top_logprobs=20,
    ),
    "JSON": Sampling(),
}
SO_FAR = 200  # tokens that a penalised row has sampled
ENTROPY = 3.1  # nats of the next token: what a trained model has, roughly
FLAT_STD = 0.6  # of the logits of an untrained one
END = "<|end|>"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["person", "place", "thing"]},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}

Logits = NDArray[np.float32]


def make_grammar(vocabulary: int, folder: Path) -> Grammar:
    """A grammar over so many invented tokens: bytes, then strings of JSON's own characters."""
    letters = string.ascii_lowercase + string.digits + '"{}[]:,Ġ'
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    longer = itertools.chain.from_iterable(
        map("".join, itertools.product(letters, repeat=length)) for length in (2, 3, 4)
    )
    tokens = [*alphabet, *itertools.islice(longer, vocabulary - len(alphabet) - 1)]
    ids = {token: id for id, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([END])
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size == vocabulary, tokenizer.vocab_size
    compiled = Grammars(tokenizer, frozenset({vocabulary - 1})).compile(Shape(SCHEMA), None)
    assert compiled.grammar is not None
    return compiled.grammar


def make_logits(batch: int, vocabulary: int, is_flat: bool, seed: int) -> Logits:
    """Normal logits, as peaked as a trained model's: ENTROPY is about ln(V) - std**2 / 2."""
    std = FLAT_STD if is_flat else math.sqrt(2 * (math.log(vocabulary) - ENTROPY))
    drawn = np.random.default_rng(seed).standard_normal((batch, vocabulary), dtype=np.float32)
    return drawn * np.float32(std)


@dataclass
class Batch:
    """The rows of one kind: `mask` renews what the grammar allows, `advance` takes the tokens."""

    kind: str
    size: int
    vocabulary: int
    grammar: Grammar
    threads: int = 1
    sampler: HostSampler = field(init=False)
    rows: list[SamplerRow] = field(init=False)
    matchers: list[Matcher] = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = HostSampler(self.vocabulary, self.threads)
        random = np.random.default_rng(self.size)
        so_far = random.integers(0, self.vocabulary, (self.size, SO_FAR)).tolist()
        sampling = KINDS[self.kind]
        self.rows = [SamplerRow.resumed(sampling, i, so_far[i]) for i in range(self.size)]
        self.matchers = [self.grammar.matcher() for _ in self.rows] if self.kind == "JSON" else []

    def mask(self) -> None:
        for row, matcher in zip(self.rows, self.matchers, strict=False):
            row.mask = matcher.mask()

    def sample(self, logits: Logits) -> list[int]:
        found = self.sampler.sample(logits, range(self.size), self.rows)
        assert all(isinstance(each, Sampled) for each in found), found
        return [each.token for each in found if isinstance(each, Sampled)]

    def advance(self, tokens: list[int]) -> None:
        """Into the grammar and on to the next random number; the penalised tokens stay."""
        for i, row in enumerate(self.rows):
            row.position += 1
            if self.matchers:
                self.matchers[i].advance(tokens[i])
                if self.matchers[i].ended:
                    self.matchers[i] = self.grammar.matcher()

    def forbidden(self) -> NDArray[np.bool_]:
        """What the masks forbid now, [size, vocabulary]."""
        masks = np.stack([row.mask for row in self.rows if row.mask is not None])
        bits = np.unpackbits(masks.view(np.uint8), axis=1, count=self.vocabulary, bitorder="little")
        return bits == 0


def full_sort(logits: Logits, rows: list[SamplerRow]) -> list[object]:
    """The law in as few lines as numpy needs: every row sorted whole, all in float64."""
    return [_full_sort(x.astype(np.float64), row) for x, row in zip(logits, rows, strict=True)]


def _full_sort(x: NDArray[np.float64], row: SamplerRow) -> object:
    sampling, raw = row.sampling, x.copy()
    for token, count in row.counts.items():
        x[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        x[token] += bias
    if row.mask is not None:
        bits = np.unpackbits(row.mask.view(np.uint8), count=x.size, bitorder="little")
        x[bits == 0] = -np.inf
    order = np.argsort(-x, kind="stable")
    token = int(order[0])
    if sampling.temperature > 0:
        p = np.exp((x - x.max()) / sampling.temperature)
        mass = np.cumsum(p[order] / p.sum())
        last = int(np.searchsorted(mass, sampling.top_p)) if sampling.top_p < 1 else x.size - 1
        u = uniform(sampling.seed, row.choice, row.position)
        token = int(order[min(int(np.searchsorted(mass, u * mass[last], "right")), last)])
    if not sampling.logprobs:
        return token
    logprobs = raw - raw.max()
    logprobs -= math.log(np.exp(logprobs).sum())
    top = np.argsort(-logprobs, kind="stable")[: sampling.top_logprobs]
    return token, logprobs[token], top, logprobs[top]
