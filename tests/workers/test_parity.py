"""Tokens, logits and log-probabilities against those of `transformers`, for each model family.

The fixtures beside `tests/parity/make.py` hold what `transformers` computed in fp32, each row
alone and without padding. Here the same eight prompts are prefilled into eight slots and decoded
together, so a wrong length, position, window or neighbour shows; and the laws (a row alone, a
prompt in pieces) are those of every family. Log-probabilities are the sampler's, which must report
the model's own whatever it samples from. It knows nothing of other precisions than fp32 on the CPU
provider: test_builds.py.
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

from workers.drawing.sampler import HostSampler, Sampled, SamplerRow, Sampling
from workers.loading.wording import Wording
from workers.running.runner import Runner

MODELS = Path(os.environ.get("PARITY_MODELS") or Path(__file__).parents[1] / "parity" / "models")
SLOTS = 8
CONTEXT = 96
ORIGINAL = 32  # the context of Phi's short factors
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A family in a session of `context` positions.

    `transformers` takes the long factors for texts beyond the original context alone, a long
    session always: there they agree on texts of more than `above` tokens.
    """

    family: str
    context: int = CONTEXT
    above: int = 0


FAMILIES = (
    *("llama", "llama2", "llama3", "qwen2", "qwen3", "mistral"),
    *("gemma", "gemma2", "gemma3", "smollm3"),
)
CASES = {
    **{name: Case(name) for name in FAMILIES},
    **{f"{name}-short": Case(name, context=ORIGINAL) for name in ("phi3", "phi4")},
    **{f"{name}-long": Case(name, above=ORIGINAL) for name in ("phi3", "phi4")},
}


@dataclass(frozen=True)
class Expected:
    """What fits a case's context: a step follows so many tokens after the prompt's last."""

    prompts: list[list[int]]
    tokens: NDArray[np.int64]  # [rows, steps]
    logits: dict[int, NDArray[np.float32]]  # step -> [rows, V]
    logprobs: NDArray[np.float32]  # [rows, steps], of the tokens
    top: NDArray[np.int64]  # [rows, steps, 20]: the most probable tokens
    top_logprobs: NDArray[np.float32]  # [rows, steps, 20]
    promised: NDArray[np.bool_]  # [rows, steps]: where the two agree

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.array([len(prompt) for prompt in self.prompts], np.int32)

    @property
    def steps(self) -> int:
        return self.tokens.shape[1]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def expected(case: Case) -> Expected:
    with np.load(MODELS / f"expected_{case.family}.npz") as stored:
        lengths = stored["lengths"][stored["lengths"] <= case.context * 2 // 3]
        rows, longest = len(lengths), int(lengths[-1])
        steps = min(stored["tokens"].shape[1], case.context - longest + 1)
        at = stored["logit_steps"].tolist()
        names = ("logprobs", "top", "top_logprobs")
        return Expected(
            [
                row[:length].tolist()
                for row, length in zip(stored["prompts"], lengths, strict=False)
            ],
            stored["tokens"][:rows, :steps],
            {step: stored["logits"][:rows, i] for i, step in enumerate(at) if step < steps},
            *(stored[name][:rows, :steps] for name in names),
            lengths[:, None] + np.arange(steps) > case.above,
        )


@pytest.fixture(scope="module")
def runner(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """On a copy, so that what the runner prepares never lands beside the fixtures."""
    folder = shutil.copytree(MODELS / case.family, tmp_path_factory.mktemp("parity") / case.family)
    runner = Runner(folder, slots=SLOTS, max_length=case.context, context=case.context, threads=1)
    yield runner
    runner.close()


def steps_of(
    runner: Runner, expected: Expected, rows: slice = slice(None), steps: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """Prefills the rows into slots 0.., then decodes them together; yields [rows, V] per step.

    They are fed the expected tokens: those that they chose themselves, wherever that is promised.
    """
    prompts, tokens = expected.prompts[rows], expected.tokens[rows]
    yield np.stack([runner.prefill(slot, prompt) for slot, prompt in enumerate(prompts)])
    for step in range(1, steps or expected.steps):
        yield runner.decode(tokens[:, step - 1], expected.lengths[rows] + (step - 1)).copy()


def assert_equal(
    logits: NDArray[np.float32], expected: Expected, step: int, rows: slice = slice(None)
) -> None:
    promised = expected.promised[rows, step]
    chosen = logits.argmax(axis=-1)
    np.testing.assert_array_equal(chosen[promised], expected.tokens[rows, step][promised])
    if step in expected.logits:
        np.testing.assert_allclose(
            logits[promised], expected.logits[step][rows][promised], rtol=0, atol=TOLERANCE
        )


def test_ragged_rows_decoded_together_match_transformers(
    runner: Runner, expected: Expected
) -> None:
    assert expected.promised.sum() > 40 and len(expected.logits) > 4
    for step, logits in enumerate(steps_of(runner, expected)):
        assert_equal(logits, expected, step)


def test_a_slot_used_before_matches_as_well(runner: Runner, expected: Expected) -> None:
    """The longest prompts first sit where the shortest go: what they left must not be seen."""
    list(steps_of(runner, expected, slice(None, None, -1), steps=3))
    for step, logits in enumerate(steps_of(runner, expected, steps=6)):
        assert_equal(logits, expected, step)


def test_rows_that_leave_and_move_match_transformers(runner: Runner, expected: Expected) -> None:
    """Half-way, the first rows leave and the last ones are copied into their slots."""
    half, leave = expected.steps // 2, len(expected.prompts) // 2
    list(steps_of(runner, expected, steps=half))
    stay = slice(leave, None)
    lengths = expected.lengths[stay] + half - 1
    for slot, length in enumerate(lengths.tolist()):
        runner.copy(leave + slot, slot, length)
    for step in range(half, expected.steps):
        logits = runner.decode(expected.tokens[stay, step - 1], lengths)
        assert_equal(logits, expected, step, stay)
        lengths = lengths + 1


def test_a_row_alone_is_bitwise_the_row_in_the_batch(runner: Runner, expected: Expected) -> None:
    together = np.stack(list(steps_of(runner, expected)), axis=1)
    for row in range(len(expected.prompts)):
        alone = np.concatenate(list(steps_of(runner, expected, slice(row, row + 1))))
        np.testing.assert_array_equal(alone, together[row])


def pieces(length: int, random: np.random.Generator) -> list[slice]:
    """A prompt cut at random into pieces of two tokens or more."""
    ends, end = [], 0
    while length - end > 3:
        end += int(random.integers(2, length - end - 1))
        ends.append(end)
    return [slice(*cut) for cut in zip([0, *ends], [*ends, length], strict=True)]


def test_a_prompt_in_pieces_is_bitwise_the_whole_prompt(
    runner: Runner, expected: Expected, seed: int = 11
) -> None:
    random, prompt = np.random.default_rng(seed), expected.prompts[-1]
    prompt = prompt + expected.tokens[-1].tolist()
    prompt = prompt[: runner.max_length - 1]
    whole = runner.prefill(0, prompt)
    after = runner.decode([7], [len(prompt)]).copy()
    for _ in range(6):
        cuts = pieces(len(prompt), random)
        for cut in cuts:
            logits = runner.prefill(0, prompt[cut], cut.start)
        np.testing.assert_array_equal(logits, whole, err_msg=f"seed {seed}: {cuts}")
        np.testing.assert_array_equal(runner.decode([7], [len(prompt)]), after)


def test_every_token_that_ends_a_text_is_known(case: Case) -> None:
    ends = Wording.load(MODELS / case.family).eos
    assert ends == ({294, 295} if case.family == "llama3" else {295})


def mask_of(token: int, vocab: int) -> NDArray[np.int32]:
    """Allows this token alone."""
    allowed = np.zeros(32 * -(-vocab // 32), np.uint8)
    allowed[token] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)


def assert_logprobs(sampled: Sampled, expected: Expected, row: int, step: int) -> None:
    assert sampled.logprob == pytest.approx(expected.logprobs[row, step], abs=TOLERANCE)
    recorded = expected.top_logprobs[row, step]
    assert [p for _, p in sampled.top] == pytest.approx(recorded, abs=TOLERANCE)
    by_id = dict(zip(expected.top[row, step].tolist(), recorded, strict=True))
    for id, logprob in sampled.top:  # but for the last, who may have an equal outside
        assert logprob == pytest.approx(by_id.get(id, recorded[-1]), abs=TOLERANCE)


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
    rows = [SamplerRow(sampling, choice) for choice in range(len(expected.prompts))]
    for step, logits in enumerate(steps_of(runner, expected)):
        tokens = expected.tokens[:, step].tolist()
        for row, token, promised in zip(rows, tokens, expected.promised[:, step], strict=True):
            row.mask = None if is_free and promised else mask_of(token, logits.shape[1])
        outcomes = HostSampler(logits.shape[1]).sample(logits, range(len(rows)), rows)
        for at, (row, sampled) in enumerate(zip(rows, outcomes, strict=True)):
            assert isinstance(sampled, Sampled)
            assert sampled.token == tokens[at]
            if expected.promised[at, step]:
                assert_logprobs(sampled, expected, at, step)
            row.advance(sampled.token)
