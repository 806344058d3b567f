"""Tokens, logits and log-probabilities against those of `transformers`, for each model family.

The fixtures beside `tests/parity/make.py` hold what `transformers` computed in fp32, each row
alone and without padding. Here the same eight prompts are prefilled into eight slots and decoded
together, so a wrong length, position or neighbour shows. Log-probabilities are the sampler's,
which must report the model's own whatever it samples from. It knows nothing of other precisions
than fp32 on the CPU provider.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.runner import Runner
from workers.sampler import Sampled, SamplerRow, Sampling, sample

MODELS = Path(os.environ.get("PARITY_MODELS") or Path(__file__).parents[1] / "parity" / "models")
FAMILIES = ("llama", "qwen2", "qwen3")
SLOTS = 8
MAX_LENGTH = 96
TOLERANCE = 1e-3
LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Expected:
    prompts: list[list[int]]
    tokens: NDArray[np.int64]  # [rows, steps]
    logits: NDArray[np.float32]  # [rows, steps, V]; step 0 follows the prompt's last token
    logprobs: NDArray[np.float32]  # [rows, steps], of the tokens
    top: NDArray[np.int64]  # [rows, steps, 20]: the most probable tokens
    top_logprobs: NDArray[np.float32]  # [rows, steps, 20]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(family: str) -> Expected:
    with np.load(MODELS / f"expected_{family}.npz") as stored:
        rows = zip(stored["prompts"], stored["lengths"], strict=True)
        prompts = [row[:length].tolist() for row, length in rows]
        names = ("tokens", "logits", "logprobs", "top", "top_logprobs")
        return Expected(prompts, *(stored[name] for name in names))


@pytest.fixture(scope="module")
def runner(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """On a copy, so that what the runner prepares never lands beside the fixtures."""
    folder = shutil.copytree(MODELS / family, tmp_path_factory.mktemp("parity") / family)
    runner = Runner(folder, slots=SLOTS, max_length=MAX_LENGTH, device="cpu", threads=1)
    yield runner
    runner.close()


def greedy(
    runner: Runner, prompts: list[list[int]], steps: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Prefills row i into slot i, then decodes all rows together: tokens and logits per step."""
    logits = [np.stack([runner.prefill(slot, prompt) for slot, prompt in enumerate(prompts)])]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    while len(logits) < steps:
        tokens = logits[-1].argmax(axis=-1).astype(np.int64)
        logits.append(runner.decode(tokens, lengths).copy())
        lengths = lengths + 1
    together = np.stack(logits, axis=1)
    return together.argmax(axis=-1).astype(np.int64), together


def test_eight_ragged_rows_decoded_together_match_transformers(
    runner: Runner, expected: Expected
) -> None:
    tokens, logits = greedy(runner, expected.prompts, expected.tokens.shape[1])
    np.testing.assert_array_equal(tokens, expected.tokens)
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=TOLERANCE)


def test_a_slot_used_before_matches_as_well(runner: Runner, expected: Expected) -> None:
    """The longest prompts first sit where the shortest go: what they left must not be seen."""
    backwards = expected.prompts[::-1]
    greedy(runner, backwards, steps=3)
    tokens, logits = greedy(runner, expected.prompts, steps=6)
    np.testing.assert_array_equal(tokens, expected.tokens[:, :6])
    np.testing.assert_allclose(logits, expected.logits[:, :6], rtol=0, atol=TOLERANCE)


def test_rows_that_leave_and_move_match_transformers(runner: Runner, expected: Expected) -> None:
    """Half-way, the first four rows leave and the last four are copied into their slots."""
    steps, half = expected.tokens.shape[1], expected.tokens.shape[1] // 2
    _, before = greedy(runner, expected.prompts, half)
    stay = range(SLOTS // 2, SLOTS)
    lengths = np.array([len(expected.prompts[row]) + half - 1 for row in stay], np.int32)
    for slot, row in enumerate(stay):
        runner.copy(row, slot, int(lengths[slot]))
    logits = before[SLOTS // 2 :, -1]
    for step in range(half, steps):
        tokens = logits.argmax(axis=-1).astype(np.int64)
        logits = runner.decode(tokens, lengths)
        lengths = lengths + 1
        np.testing.assert_allclose(
            logits, expected.logits[SLOTS // 2 :, step], rtol=0, atol=TOLERANCE
        )


def mask_of(token: int, vocab: int) -> NDArray[np.int32]:
    """Allows this token alone."""
    allowed = np.zeros(32 * -(-vocab // 32), np.uint8)
    allowed[token] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)


def assert_logprobs(sampled: Sampled, expected: Expected, row: int, step: int) -> None:
    assert sampled.logprob == pytest.approx(expected.logprobs[row, step], abs=LOGPROB_TOLERANCE)
    recorded = expected.top_logprobs[row, step]
    assert [p for _, p in sampled.top] == pytest.approx(recorded, abs=LOGPROB_TOLERANCE)
    by_id = dict(zip(expected.top[row, step].tolist(), recorded, strict=True))
    for id, logprob in sampled.top:  # but for the last, who may have an equal outside
        assert logprob == pytest.approx(by_id.get(id, recorded[-1]), abs=LOGPROB_TOLERANCE)


# What is sampled from must not show in what is reported: not the mask either, which makes all of
# these sample the recorded tokens.
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.0, logprobs=True, top_logprobs=20),
        Sampling(logprobs=True, top_logprobs=20),
        Sampling(
            1.7, 0.5, 1.5, -1.0, ((3, 90.0), (4, -100.0)), logprobs=True, top_logprobs=20, seed=5
        ),
    ],
    ids=["greedy", "sampled", "everything"],
)
def test_logprobs_are_those_of_transformers(
    runner: Runner, expected: Expected, sampling: Sampling
) -> None:
    is_free = sampling.temperature == 0
    rows = [SamplerRow(sampling, choice) for choice in range(SLOTS)]
    lengths = np.array([len(prompt) for prompt in expected.prompts], np.int32)
    logits = np.stack([runner.prefill(slot, p) for slot, p in enumerate(expected.prompts)])
    for step in range(expected.tokens.shape[1]):
        tokens = expected.tokens[:, step]
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.mask = None if is_free else mask_of(token, logits.shape[1])
        outcomes = sample(logits, rows, logits.shape[1])
        for at, (row, sampled) in enumerate(zip(rows, outcomes, strict=True)):
            assert isinstance(sampled, Sampled)
            assert sampled.token == tokens[at]
            assert_logprobs(sampled, expected, at, step)
            row.advance(sampled.token)
        logits = runner.decode(tokens, lengths).copy()
        lengths = lengths + 1
