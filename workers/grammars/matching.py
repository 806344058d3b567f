"""Masks of the tokens that may come next in a grammar; the only file that imports `llguidance`.

Knows nothing of schemas, functions or what a grammar is for. Where a grammar is of calls that are
free to come or not, there is no mask until one opens (`opening`): the grammar begins with it.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from orchestrator.errors import RequestError
from workers.grammars.opening import Before, Openings
from workers.words.text import Call
from workers.words.tokenizer import Tokenizer

Mask = NDArray[np.int32]
"""[ceil(vocabulary / 32)]: one bit per token, least significant first, set where it may come."""

GRAMMAR_VERSION = f"1, llguidance {version('llguidance')}"
"""Part of `system_fingerprint`: raise its number with any change that can change a mask."""

_LIMITS = LLParserLimits(verbose_errors=False)


class Vocabulary:
    """A model's tokens for llguidance; `spelled` are markers that count as text."""

    def __init__(
        self, tokenizer: Tokenizer, eos: frozenset[int], spelled: Mapping[int, bytes]
    ) -> None:
        size = tokenizer.vocab_size
        self.tokens = [spelled.get(id, tokenizer.token_bytes(id)) for id in range(size)]
        self.words = -(-size // 32)
        self.eos = eos
        ends = sorted(id for id in eos if id < size) or [size]  # none: one that never comes
        given = _Given(tokenizer, self.tokens, ends)
        self.inner = LLTokenizer(TokenizerWrapper(given), n_vocab=len(given.tokens), eos_token=ends)
        self._ids = {token: id for id, token in enumerate(self.tokens) if token}
        self._longest = max(map(len, self._ids), default=0)

    def pieces(self, data: bytes) -> list[int] | None:
        """Tokens for `data`, the longest first; None if there are none."""
        found, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), None)
            if end is None:
                return None
            found.append(self._ids[data[at:end]])
            at = end
        return found

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of `grammar`; ValueError with the reason if there is none."""
        matcher = LLMatcher(self.inner, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise ValueError(_reason(matcher))
        tried = matcher.deep_copy()
        tried.compute_bitmask()
        if tried.is_stopped():
            raise ValueError("no text matches it")
        return matcher


class _Given:
    """The attributes that llguidance asks a tokenizer for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        silent = {id for id, token in enumerate(tokens) if not token}
        self.special_token_ids = sorted(silent | set(ends))
        shown = [token or tokenizer.token(id).encode() for id, token in enumerate(tokens)]
        self.tokens = shown + [b"<no end>"] * (ends[-1] + 1 - len(tokens))

    def __call__(self, text: str) -> list[int]:
        return []  # our grammars force no spelling in tokens, so none is asked for


class Grammar:
    """A compiled shape. Safe to use from several threads; each choice has a matcher of its own."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        compiled: LLMatcher,
        fault: Callable[[str, Sequence[Call]], str | None],
        openings: Openings | None,
    ) -> None:
        self._vocabulary, self._compiled, self._fault = vocabulary, compiled, fault
        self._openings = openings
        self._lock = threading.Lock()
        self._masks: dict[Before, Mask | None] = {}

    def matcher(self) -> "Matcher":
        """At the beginning of a completion."""
        return Matcher(self, self._vocabulary)

    def fault(self, text: str, calls: Sequence[Call]) -> str | None:
        """What is wrong with a finished completion; None: nothing."""
        return self._fault(text, calls)

    @property
    def beginning(self) -> Before | LLMatcher:
        return self._openings.beginning if self._openings else self.start()

    def start(self) -> LLMatcher:
        """A matcher of the grammar itself: of calls alone, where nothing is asked before one."""
        with self._lock:
            return self._compiled.deep_copy()

    def mask_before(self, before: Before) -> Mask | None:
        """What may come where no call has opened; None: any token.

        Only a token that opens a call and goes on in a way no call does is kept out.
        """
        if before not in self._masks:
            leading = before.openings.leading(before)
            wrong = [id for id, data in leading.items() if not self._begins(data)]
            self._masks[before] = self._all_but(wrong) if wrong else None
        return self._masks[before]

    def _begins(self, data: bytes) -> bool:
        tokens = self._vocabulary.pieces(data)
        if tokens is None:
            return False
        with self._lock:
            return bool(self._compiled.validate_tokens(tokens) == len(tokens))

    def _all_but(self, ids: Sequence[int]) -> Mask:
        bits = np.ones(32 * self._vocabulary.words, np.uint8)
        bits[ids] = 0
        return np.packbits(bits, bitorder="little").view(np.int32)


class Matcher:
    """One choice's place in a grammar; a function of the tokens it has advanced by."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self._grammar, self._vocabulary = grammar, vocabulary
        self._place: Before | LLMatcher = grammar.beginning
        self._mask = np.zeros(vocabulary.words + 1, np.int32)

    def mask(self) -> Mask | None:
        """The tokens that may come next, EOS among them; None: any.

        The array belongs to the matcher, which overwrites it the next time.
        """
        place = self._place
        if isinstance(place, Before):
            return self._grammar.mask_before(place)
        size = -(-self._vocabulary.inner.vocab_size // 32)
        place.unsafe_compute_mask_ptr(self._mask.ctypes.data, 4 * size)
        if place.is_error():
            raise RequestError("grammar", f"the grammar is too much to follow: {_reason(place)}")
        return self._mask[: self._vocabulary.words]

    def advance(self, token: int) -> None:
        """Take the next token; RequestError `grammar` if it may not come."""
        tokens = [token]
        if isinstance(self._place, Before):
            now = self._place.after(self._vocabulary.tokens[token])
            if isinstance(now, Before):
                self._place = now
                return
            self._place = self._grammar.start()
            tokens = self._vocabulary.pieces(now) or tokens
        if not self._place.consume_tokens(tokens):
            raise RequestError(
                "grammar", f"token {token} may not come here: {_reason(self._place)}"
            )

    @property
    def ended(self) -> bool:
        """Nothing may follow."""
        return not isinstance(self._place, Before) and self._place.is_stopped()


def _reason(matcher: LLMatcher) -> str:
    """The library's words, without its place in our grammar and a copy of it."""
    text = matcher.get_error().split("\n   1 |")[0]
    text = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |<non-verbose/>", "", text)
    return " ".join(text.split())
