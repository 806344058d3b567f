"""Logits and parameters to tokens, row by row of the running batch.

Knows nothing of slots, models, text or grammars: a row is an array of logits, the parameters of
its request, the tokens its choice has sampled so far, and perhaps a mask of allowed tokens.

The order of operations is docs/chat-completions-streaming.md section 2.1. A row's token is a
function of that row alone (its logits, parameters, counts, choice and position): all sums are
exact (kernels.py), and the random number is counter-based, so neither the batch, nor the slot, nor
a thread, nor a resumption can change it.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import RequestError
from workers.drawing import kernels
from workers.drawing.philox import uniform
from workers.drawing.sampling import Edits, Sampled, SamplerRow, Sampling

__all__ = [
    "GREEDY_BELOW",
    "LOWEST_LOGPROB",
    "SAMPLER_VERSION",
    "HostSampler",
    "Sampled",
    "SamplerRow",
    "Sampling",
]

SAMPLER_VERSION = kernels.VERSION
"""Part of `system_fingerprint`."""

GREEDY_BELOW = 1e-5
LOWEST_LOGPROB = kernels.LOWEST_LOGPROB

Logits = NDArray[np.float32]
_Numbers = tuple[int, int, int, float, float, float, int, int, int]  # kernels.ROW

_WORTH_SHARING = 2**17  # logits of a step: fewer are sampled sooner than a thread is woken
_NO_EDITS: Edits = np.empty(0, np.int64), np.empty(0, np.float64)
_NO_MASKS = np.empty((1, 0), np.int32)


class HostSampler:
    """Samples rows of logits on the host; one engine's, not for several threads at once."""

    def __init__(self, vocab_size: int, threads: int = 1) -> None:
        """Compiles the kernels, or loads what an earlier process has compiled.

        `vocab_size` is the number of tokens the tokenizer knows: columns of logits from there on
        are padding and never looked at. Up to `threads` threads share the rows of a step. Raises
        ValueError where the vocabulary is too large for exact sums.
        """
        if vocab_size > kernels.MOST_TOKENS:
            raise ValueError(f"{vocab_size} tokens; {kernels.MOST_TOKENS} can be sampled from")
        self.vocab_size, self.threads = vocab_size, threads
        self._memories: list[kernels.Memory] = []
        self._others = ThreadPoolExecutor(threads - 1, "sampler") if threads > 1 else None
        kernels.warm_up()

    def sample(
        self, logits: Logits, indices: Sequence[int], rows: Sequence[SamplerRow]
    ) -> list[Sampled | RequestError]:
        """One token for each of `rows`; `rows[k]` goes with row `indices[k]` of `logits`.

        `logits` is float32 [n, >= vocab_size]. Rows are not advanced and logits not modified. A row
        that cannot be sampled (code `nan_logits`: a NaN or no finite maximum; `no_token_allowed`:
        its mask leaves nothing) yields its error in its place.
        """
        if len(rows) == len(indices) == 0:
            return []
        return self._run(_Step.of(logits, indices, rows, self.vocab_size))

    def score(
        self, logits: Logits, index: int, row: SamplerRow, token: int
    ) -> Sampled | RequestError:
        """`token` as `sample` would have reported it: for a choice that replays its tokens.

        The token itself is not questioned; logits that are no distribution are, as in `sample`.
        """
        return self._run(_Step.of(logits, [index], [row], self.vocab_size, token))[0]

    def _run(self, step: "_Step") -> list[Sampled | RequestError]:
        count, shares = step.numbers.size, 1
        if self._others and count * step.vocabulary >= _WORTH_SHARING:
            shares = min(self.threads, count)
        memories = self._memories_of(step.vocabulary, shares)
        ends = [count * share // shares for share in range(shares + 1)]
        parts = [slice(*ends[share : share + 2]) for share in range(shares)]
        running: list[Future[None]] = []
        if self._others:
            for part, memory in zip(parts[1:], memories[1:], strict=False):
                running.append(self._others.submit(step.run, part, memory))
        step.run(parts[0], memories[0])
        for other in running:
            other.result()
        return step.outcomes()

    def _memories_of(self, vocabulary: int, count: int) -> list[kernels.Memory]:
        if self._memories and self._memories[0].row.size != vocabulary:
            self._memories.clear()
        while len(self._memories) < count:
            self._memories.append(kernels.make_memory(vocabulary))
        return self._memories


@dataclass(frozen=True, slots=True)
class _Step:
    """The rows of a call as the kernels take them, and room for what they find."""

    logits: Logits
    vocabulary: int
    numbers: NDArray[np.void]
    edits: Edits
    masks: NDArray[np.int32]
    results: NDArray[np.void]
    top: NDArray[np.int64]
    logprobs: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        logits: Logits,
        indices: Sequence[int],
        rows: Sequence[SamplerRow],
        vocab_size: int,
        token: int = -1,
    ) -> "_Step":
        """`token`: to be scored; -1: one is to be sampled for each row.

        Raises IndexError where a row, a token or a mask's bit is not there.
        """
        vocabulary = min(vocab_size, logits.shape[1])
        if not -len(logits) <= min(indices) <= max(indices) < len(logits) or token >= vocabulary:
            raise IndexError(f"rows {indices} of {len(logits)}, token {token} of {vocabulary}")
        if not _is_plain(logits):
            logits = np.array(logits[list(indices)], dtype=np.float32, order="C")
            indices = range(len(rows))
        pairs = zip(indices, rows, strict=True)
        listed = [_numbers(index % len(logits), row, token, vocabulary) for index, row in pairs]
        numbers = np.array(listed, dtype=kernels.ROW)
        edits, masks = _NO_EDITS, _NO_MASKS
        if token < 0:
            edits = _edits(numbers, rows, vocabulary)
            masks = _masks(numbers, rows, vocabulary)
        results = np.zeros(len(rows), dtype=kernels.RESULT)
        top = np.empty((len(rows), max(1, max(each[2] for each in listed))), np.int64)
        logprobs = np.empty(top.shape, np.float64)
        return cls(logits, vocabulary, numbers, edits, masks, results, top, logprobs)

    def run(self, part: slice, memory: kernels.Memory) -> None:
        """Sample or score some of the rows; several threads may, each with its part and memory."""
        kernels.sample_rows(
            self.logits,
            self.numbers[part],
            *self.edits,
            self.masks,
            self.results[part],
            self.top[part],
            self.logprobs[part],
            memory,
        )

    def outcomes(self) -> list[Sampled | RequestError]:
        """What was found for each row."""
        n_tops = self.numbers["n_top"].tolist()
        return [
            self._outcome(place, n_top, *found)
            for place, (n_top, found) in enumerate(zip(n_tops, self.results.tolist(), strict=True))
        ]

    def _outcome(
        self, place: int, n_top: int, token: int, problem: int, logprob: float
    ) -> Sampled | RequestError:
        if problem == kernels.NOT_FINITE:
            return RequestError("nan_logits", f"row {place}: the largest logit is {logprob}")
        if problem == kernels.NONE_ALLOWED:
            return RequestError("no_token_allowed", f"row {place}: the mask allows no token")
        if n_top < 0:
            return Sampled(token)
        ids, logprobs = self.top[place, :n_top].tolist(), self.logprobs[place, :n_top].tolist()
        return Sampled(token, logprob, tuple(zip(ids, logprobs, strict=True)))


def _is_plain(logits: Logits) -> bool:
    """Float32 rows that lie one behind the other; the kernels want memory that may be written."""
    return logits.dtype == np.float32 and logits.flags.c_contiguous and logits.flags.writeable


def _numbers(index: int, row: SamplerRow, token: int, vocabulary: int) -> _Numbers:
    """As yet without edits and mask."""
    sampling, u = row.sampling, 0.0
    is_greedy = sampling.temperature < GREEDY_BELOW or sampling.top_p <= 0
    if not is_greedy and token < 0:
        u = uniform(sampling.seed, row.choice, row.position)
    n_top = min(sampling.top_logprobs, vocabulary) if sampling.logprobs else -1
    temperature = 0.0 if is_greedy else sampling.temperature
    return index, token, n_top, temperature, sampling.top_p, u, 0, 0, -1


def _edits(numbers: NDArray[np.void], rows: Sequence[SamplerRow], vocabulary: int) -> Edits:
    """One row's after the other's; `numbers` say where whose lie."""
    each = [row.edits() for row in rows]
    pieces = [edits for edits_of_row in each for edits in edits_of_row]
    if not pieces:
        return _NO_EDITS
    ends = list(accumulate(sum(ids.size for ids, _ in edits) for edits in each))
    numbers["first_edit"], numbers["end_of_edits"] = [0, *ends[:-1]], ends
    ids, amounts = (np.concatenate(part) for part in zip(*pieces, strict=True))
    if ids.size and ids.view(np.uint64).max() >= vocabulary:
        raise IndexError(f"bias or counts of tokens {ids.min()} to {ids.max()} of {vocabulary}")
    return ids, amounts


def _masks(
    numbers: NDArray[np.void], rows: Sequence[SamplerRow], vocabulary: int
) -> NDArray[np.int32]:
    """One below the other; `numbers` say which is whose."""
    words = -(-vocabulary // 32)
    masks: list[NDArray[np.int32]] = []
    for place, row in enumerate(rows):
        if row.mask is not None:
            if row.mask.size < words:
                raise IndexError(f"row {place}: a mask has a bit for each of {vocabulary} tokens")
            numbers["mask"][place] = len(masks)
            masks.append(row.mask[:words])
    return np.stack(masks) if masks else _NO_MASKS
