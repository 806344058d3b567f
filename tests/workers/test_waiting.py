"""The order in which completions wait, and what it is worth."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tests.fake_runner import FakeRunner
from tests.workers.test_engine import ENDLESS, EOS
from workers.drawing.sampler import Sampling
from workers.engine.engine import Choice, Completion, Engine, longest_first
from workers.words.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parents[1] / "parity/models/llama")


def asked(id: int, prompt: Sequence[int], tokens: int | None) -> Completion:
    sampling = Sampling(seed=id, logit_bias=ENDLESS)
    return Completion(id, tuple(prompt), sampling, (Choice(0),), max_tokens=tokens)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 99) | st.none()), max_size=20))
def test_the_longest_are_first_and_those_of_one_prompt_together(
    shapes: list[tuple[int, int | None]],
) -> None:
    given = [asked(i, (prompt,), tokens) for i, (prompt, tokens) in enumerate(shapes)]
    ordered = longest_first(given, 500)
    assert sorted(each.id for each in ordered) == list(range(len(given)))
    seen: list[tuple[int, ...]] = []
    for each in ordered:
        if not seen or seen[-1] != each.prompt:
            assert each.prompt not in seen, "they are torn apart"
            seen.append(each.prompt)
    length = {each.id: each.max_tokens or 499 for each in given}
    longest = {each.prompt: 0 for each in given}
    for each in given:
        longest[each.prompt] = max(longest[each.prompt], length[each.id])
    keys = [(longest[each.prompt], length[each.id]) for each in ordered]
    assert all(a[0] >= b[0] for a, b in pairwise(keys))
    for a, b in pairwise(ordered):
        if a.prompt == b.prompt:
            assert length[a.id] >= length[b.id]


def steps(completions: Sequence[Completion], slots: int) -> int:
    runner = FakeRunner(TOKENIZER.vocab_size, slots=slots, max_length=300)
    engine = Engine(runner, TOKENIZER, EOS)
    for completion in completions:
        engine.admit(completion)
    while not engine.idle:
        engine.step()
    return runner.steps


def test_a_mixed_load_takes_fewer_steps_longest_first() -> None:
    """64 requests of 16 to 256 tokens on 8 slots: the batch is full until the end."""
    for seed in range(3):
        random = Random(seed)
        load = [asked(i, (20 + i, 21, 22), random.randint(16, 256)) for i in range(64)]
        tokens = sum(each.max_tokens or 0 for each in load)
        as_given, ordered = steps(load, 8), steps(longest_first(load, 300), 8)
        least = tokens / 8
        print(f"seed {seed}: {as_given} steps as given, {ordered} ordered, {least:.0f} at least")
        assert ordered <= least * 1.03 + 8 < as_given
