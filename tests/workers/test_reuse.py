"""On real models: reused, cut into chunks, moved, parked or killed, every number stays bitwise.

The engine over the CPU provider, families with and without windows, fp32 and int4; what is compared
are tokens and log-probabilities to the last bit, beside a run of each completion by itself.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.test_engine import Transcript
from workers.drawing.sampler import Sampling
from workers.engine.engine import Choice, Completion, Engine
from workers.folders.folder import TINY
from workers.running.runner import Runner
from workers.words.tokenizer import Tokenizer

MODELS = Path(__file__).parents[1] / "parity" / "models"
FAMILIES = ("tiny", "llama3", "gemma2", "mistral", "qwen3-int4")
LENGTH = 120
CACHES = (0, 60_000, 2**29)


@pytest.fixture(scope="module", params=FAMILIES)
def runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    name = request.param
    source = TINY if name == "tiny" else MODELS / name
    folder = shutil.copytree(source, tmp_path_factory.mktemp("reuse") / name)
    made = Runner(folder, slots=4, max_length=LENGTH, staging=3, threads=1)
    yield made
    made.close()


def asked(shapes: list[tuple[int, int, int, int]]) -> list[Completion]:
    """Of each (common beginning, its own tokens, choices, tokens to sample)."""
    found = []
    for id, (common, own, n, tokens) in enumerate(shapes):
        prompt = (*range(20, 20 + common), *(40 + (id // 2 * 17 + i * 3) % 60 for i in range(own)))
        sampling = Sampling(temperature=0.9, top_p=0.95, seed=id, logprobs=True, top_logprobs=4)
        choices = tuple(map(Choice, range(n)))
        found.append(Completion(id, prompt, sampling, choices, max_tokens=tokens))
    return found


SHAPES = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 32, 34, 64, 66]),
        st.sampled_from([0, 1, 2, 3, 17, 30]),
        st.integers(1, 3),
        st.integers(1, 12),
    ),
    min_size=2,
    max_size=6,
)


def engine_of(runner: Runner, held: int, seconds: float = 0.0, **how: float) -> Engine:
    """An engine for which every look at the clock takes so many seconds."""
    tokenizer = Tokenizer(runner.folder.path)
    clock = count(step=seconds).__next__ if seconds else lambda: 0.0
    return Engine(runner, tokenizer, frozenset(), prefix_bytes=held, clock=clock, **how)


def alone(runner: Runner, completion: Completion) -> Transcript:
    """Each choice by itself, its prompt whole."""
    seen = Transcript()
    for choice in completion.choices:
        engine = engine_of(runner, 0, max_stall=1e9)
        engine.admit(replace(completion, choices=(choice,)))
        while not engine.idle:
            seen.take(engine.step())
    return seen


def unfinished(completions: list[Completion], seen: Transcript) -> list[Completion]:
    """As the next process claims them: those at their end left out, with what is persisted."""
    found = []
    for each in completions:
        left = tuple(
            Choice(c.index, tuple(seen.tokens.get((each.id, c.index), ())))
            for c in each.choices
            if (each.id, c.index) not in seen.ends
        )
        if left:
            found.append(replace(each, choices=left))
    return found


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=SHAPES,
    held=st.sampled_from(CACHES),
    seconds=st.sampled_from([0.0, 0.06, 0.3]),
    park_at=st.integers(0, 12),
    killed_at=st.integers(0, 16),
)
def test_reuse_is_bitwise_neutral(
    runner: Runner,
    shapes: list[tuple[int, int, int, int]],
    held: int,
    seconds: float,
    park_at: int,
    killed_at: int,
) -> None:
    completions, seen = asked(shapes), Transcript()
    engine = engine_of(runner, held, seconds)
    for each in completions:
        engine.admit(each)
    for step in range(killed_at):
        if step == park_at:
            engine.park()
        if not engine.idle:
            seen.take(engine.step())
    # Killed: the next process finds garbage in every row, and an empty cache.
    engine = engine_of(runner, held, seconds)
    for each in unfinished(completions, seen):
        engine.admit(each)
    while not engine.idle:
        seen.take(engine.step())
    for each in completions:
        golden = alone(runner, each)
        for choice in each.choices:
            key = each.id, choice.index
            assert seen.tokens[key] == golden.tokens[key]
            assert seen.logprobs[key] == golden.logprobs[key], "not to the last bit"
            assert seen.ends[key] == golden.ends[key]


def test_a_hit_and_a_group_are_used_and_counted(runner: Runner) -> None:
    engine, seen = engine_of(runner, 2**29), Transcript()
    same = asked([(64, 20, 1, 3)] * 2 + [(64, 17, 1, 3)] * 2)
    for each in same:
        engine.admit(each)
    while not engine.idle:
        seen.take(engine.step())
    assert [seen.started[id].cached_tokens for id in range(4)] == [0, 84, 64, 81]
    assert engine.prompted.held_bytes >= 98 * runner.kv_bytes_per_token
