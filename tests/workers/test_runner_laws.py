"""Laws of the runner, bit for bit: however a prompt is computed and wherever it lies, its numbers
are the same. On the embedded model and on small ones of every precision and form of graph."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.parity import optimum
from workers.folders.exports import choose
from workers.folders.folder import TINY
from workers.running.memory import resident_bytes
from workers.running.runner import Runner
from workers.running.sizing import Sizing

PARITY = Path(__file__).parents[1] / "parity" / "models"
MODELS = ("tiny", "qwen3", "llama3-int4", "gemma2-fp16", "optimum", "optimum-fp16")
SLOTS, STAGING, LENGTH = 6, 2, 120
STEPS = 4

Logits = npt.NDArray[np.float32]
Make = Callable[..., Runner]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    if name == "tiny":
        return TINY
    if not name.startswith("optimum"):
        return PARITY / name
    made = optimum.export(PARITY / "llama", tmp_path_factory.mktemp(name) / "llama")
    choose(made, "model_fp16" if name.endswith("fp16") else "model")
    return made


@pytest.fixture(scope="module")
def make(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    cache = tmp_path_factory.mktemp("cache")

    def made(**how: Any) -> Runner:
        sizes = {"slots": SLOTS, "staging": STAGING, "max_length": LENGTH, "threads": 1}
        return Runner(folder, **{**sizes, **how}, cache=cache)

    return made


@pytest.fixture(scope="module")
def runner(make: Make) -> Iterator[Runner]:
    runner = make()
    yield runner
    runner.close()


@pytest.fixture
def source() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def prompt_of(source: random.Random, runner: Runner, least: int = 2) -> list[int]:
    vocab = min(runner.vocab_size, runner.folder.vocab_size)
    return [source.randrange(vocab) for _ in range(source.randint(least, LENGTH - STEPS))]


def cut(source: random.Random, length: int) -> list[int]:
    """Random ends of chunks of two tokens or more."""
    ends, at = [], 0
    while length - at >= 4 and source.random() < 0.8:
        at += source.randint(2, min(length - at - 2, 40))
        ends.append(at)
    return [*ends, length]


def steps(runner: Runner, rows: int, lengths: list[int]) -> Logits:
    """Some decode steps of rows 0..; logits [STEPS, rows, vocab]."""
    tokens = [[5 + row + step for row in range(rows)] for step in range(STEPS)]
    ends = np.array(lengths)
    return np.stack([runner.decode(each, ends + n).copy() for n, each in enumerate(tokens)])


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.parts, other.parts, strict=True))


def test_a_prompt_in_pieces_is_the_whole_prompt(runner: Runner, source: random.Random) -> None:
    for _ in range(12):
        prompt = prompt_of(source, runner)
        whole = runner.prefill(0, prompt)
        kept = runner.read(0, 0, len(prompt))
        row, start = source.randrange(SLOTS + STAGING), 0
        *ends, last = cut(source, len(prompt))
        for end in ends:
            runner.extend(row, prompt[start:end], start)
            start = end
        logits = runner.prefill(row, prompt[start:last], start)
        assert np.array_equal(logits, whole), (ends, last)
        assert same(runner.read(row, 0, len(prompt)), kept), (ends, last)


def test_no_token_of_a_prompt_is_computed_the_other_way(
    runner: Runner, source: random.Random
) -> None:
    """Attention computes in blocks of 2 * head_size rows; one row alone has other last bits."""
    block = 2 * runner.folder.head_size
    lengths = {n for n in (block + 1, 2 * block + 1, 3 * block + 1) if n <= LENGTH}
    assert lengths
    for length in (LENGTH, *lengths):
        prompt = [source.randrange(5, 200) for _ in range(length)]
        whole = runner.prefill(0, prompt)
        kept = runner.read(0, 0, length)
        for at in (*lengths, *(length - each for each in lengths), length // 2, length // 3):
            if 2 <= at <= length - 2:
                runner.extend(1, prompt[:at], 0)
                assert np.array_equal(runner.prefill(1, prompt[at:], at), whole), (length, at)
                assert same(runner.read(1, 0, length), kept), (length, at)


def test_the_last_positions_of_a_model_are_computed_alike(
    make: Make, runner: Runner, source: random.Random
) -> None:
    """Where padding would reach beyond what the model knows."""
    block = 2 * runner.folder.head_size
    other = make(slots=2, max_length=10**6)
    length = other.max_length
    assert length == runner.folder.context_length
    prompt = [source.randrange(5, 200) for _ in range(length)]
    whole = other.prefill(0, prompt)
    for at in (length - block - 1, 2):
        other.extend(1, prompt[:at], 0)
        assert np.array_equal(other.prefill(1, prompt[at:], at), whole)
        assert same(other.read(1, 0, length), other.read(0, 0, length))
    together = other.prefill_together(0, [prompt, prompt[: block + 1]])
    assert np.array_equal(together[0], whole)
    other.close()


def test_the_runner_cuts_by_itself_alike(make: Make, runner: Runner, source: random.Random) -> None:
    prompts = [prompt_of(source, runner) for _ in range(4)] + [[5, 9, 7], [5, 9]]
    for chunk in (2, 3, source.randint(4, 40)):
        other = make(chunk=chunk)
        for prompt in prompts:
            assert np.array_equal(other.prefill(1, prompt), runner.prefill(0, prompt)), chunk
            assert same(other.read(1, 0, len(prompt)), runner.read(0, 0, len(prompt)))
        other.close()


def test_prompts_together_are_each_alone(runner: Runner, source: random.Random) -> None:
    for _ in range(8):
        prompts = [prompt_of(source, runner) for _ in range(source.randint(2, 4))]
        alone = [runner.prefill(0, prompt) for prompt in prompts]
        first = source.randint(0, SLOTS + STAGING - len(prompts))
        together = runner.prefill_together(first, prompts)
        for place, prompt in enumerate(prompts):
            assert np.array_equal(together[place], alone[place])
            runner.prefill(0 if first else SLOTS, prompt)
            mine = runner.read(0 if first else SLOTS, 0, len(prompt))
            if first or place < len(prompts):
                assert same(runner.read(first + place, 0, len(prompt)), mine)


def test_a_row_decodes_alike_among_any_neighbours_at_any_place(
    runner: Runner, source: random.Random
) -> None:
    for _ in range(4):
        prompt = prompt_of(source, runner)
        runner.prefill(0, prompt)
        alone = steps(runner, 1, [len(prompt)])[:, 0]
        others = [prompt_of(source, runner) for _ in range(source.randint(1, SLOTS - 1))]
        for row, other in enumerate(others, 1):
            runner.prefill(row, other)
        together = steps(runner, len(others) + 1, [len(p) for p in (prompt, *others)])[:, 0]
        assert np.array_equal(together, alone)


def test_a_row_that_was_moved_cut_or_kept_elsewhere_decodes_alike(
    runner: Runner, source: random.Random
) -> None:
    for _ in range(6):
        prompt = prompt_of(source, runner, least=6)
        length, half = len(prompt), source.randint(2, len(prompt) - 2)
        logits = runner.prefill(0, prompt)
        expected = steps(runner, 1, [length])
        staged = SLOTS + source.randrange(STAGING)
        runner.prefill(staged, prompt)
        pieces = runner.read(staged, 0, half), runner.read(staged, half, length)
        runner.copy(staged, 0, length)
        assert np.array_equal(steps(runner, 1, [length]), expected)
        runner.prefill(0, prompt_of(source, runner))  # others come and go
        runner.trim(0, 0)
        runner.write(0, 0, pieces[0])
        runner.write(0, half, pieces[1])
        assert np.array_equal(steps(runner, 1, [length]), expected)
        runner.trim(0, half)
        assert np.array_equal(runner.prefill(0, prompt[half:], half), logits)
        assert np.array_equal(steps(runner, 1, [length]), expected)


@pytest.mark.parametrize("how", ["longer", "short of memory", "whole"])
def test_neither_the_length_of_rows_nor_what_they_may_hold_shows(
    make: Make, runner: Runner, source: random.Random, how: str
) -> None:
    sizes: dict[str, Any] = {
        "longer": {"slots": SLOTS + 3, "max_length": 2 * LENGTH},
        "short of memory": {"capacity": LENGTH},
        "whole": {"paged": False},
    }[how]
    other = make(**sizes)
    for _ in range(3):
        prompts = [prompt_of(source, runner) for _ in range(SLOTS)]
        for each in (runner, other):
            for row, prompt in enumerate(prompts):
                each.prefill(SLOTS, prompt)
                each.copy(SLOTS, row, len(prompt))
                each.trim(SLOTS, 0)
        lengths = [len(prompt) for prompt in prompts]
        assert np.array_equal(steps(runner, SLOTS, lengths), steps(other, SLOTS, lengths))
    other.close()


def test_what_is_given_back_is_nobodys(tmp_path: Path) -> None:
    """A row that was long before decodes on while others take the memory that it left."""
    sizes: dict[str, Any] = {"slots": 4, "max_length": 1000, "threads": 1, "cache": tmp_path}
    tight, whole = Runner(TINY, capacity=1000, **sizes), Runner(TINY, paged=False, **sizes)
    short, long = [7] * 40, [5, 9] * 450
    for runner in (tight, whole):
        runner.prefill(0, long)
        runner.prefill(0, short)
    for turn in range(3):
        for step in range(100):
            length = len(short) + 100 * turn + step
            assert np.array_equal(tight.decode([6], [length]), whole.decode([6], [length]))
        for row in (1, 2, 3):
            assert np.array_equal(tight.prefill(row, long), whole.prefill(row, long))
            tight.trim(row, 0)
    tight.close()
    whole.close()


def test_blocks_outlive_the_rows_they_came_from(make: Make, source: random.Random) -> None:
    runner = make()
    prompt = prompt_of(source, runner)
    runner.prefill(SLOTS, prompt)
    block = runner.read(SLOTS, 0, len(prompt))
    runner.copy(SLOTS, 0, len(prompt))
    expected = steps(runner, 1, [len(prompt)])
    runner.resize(2)
    runner.write(0, 0, block)
    assert np.array_equal(steps(runner, 1, [len(prompt)]), expected)
    sizing = Sizing(4, 1, LENGTH, 2 * LENGTH, 0, runner.kv_bytes_per_token)
    runner.allot(sizing)
    assert (runner.slots, runner.staging, runner.capacity) == (4, 1, 2 * LENGTH)
    runner.write(3, 0, block)
    runner.copy(3, 0, len(prompt))
    assert np.array_equal(steps(runner, 1, [len(prompt)]), expected)
    runner.close()


def test_more_threads_than_heads_are_not_taken(make: Make, source: random.Random) -> None:
    """They would share out the step of a long row, where it is alone: tests of the law need rows
    longer than these models'."""
    many, one = make(threads=64), make(threads=1)
    assert many.threads == many.folder.heads < 64
    prompt = prompt_of(source, one)
    assert np.array_equal(many.prefill(0, prompt), one.prefill(0, prompt))
    lengths = [len(prompt)]
    assert np.array_equal(steps(many, 1, lengths), steps(one, 1, lengths))
    for runner in (many, one):
        runner.close()


def test_what_no_row_can_hold_is_refused(runner: Runner) -> None:
    rows = SLOTS + STAGING
    refused: list[Callable[[], object]] = [
        lambda: runner.prefill(0, []),
        lambda: runner.prefill(0, [5] * (LENGTH + 1)),
        lambda: runner.prefill(0, [5] * 9, LENGTH - 8),
        lambda: runner.prefill(0, [5], 8),  # a decode step's path: other numbers
        lambda: runner.extend(0, [5], 8),
        lambda: runner.prefill(rows, [5, 6]),
        lambda: runner.prefill_together(rows - 1, [[5, 6], [5, 6]]),
        lambda: runner.prefill_together(0, [[5, 6], [5]]),
        lambda: runner.decode([5] * (SLOTS + 1), [1] * (SLOTS + 1)),
        lambda: runner.decode([], []),
        lambda: runner.decode([5], [LENGTH]),
    ]
    for call in refused:
        with pytest.raises(ValueError):
            call()
    assert runner.prefill(0, [5] * LENGTH).shape == (runner.vocab_size,)
    assert runner.prefill(0, [5] * 8, LENGTH - 8).dtype == np.float32


def test_steps_allocate_nothing_and_calls_of_any_shape_leave_nothing(
    make: Make, source: random.Random
) -> None:
    runner = make()

    def requests(count: int) -> None:
        for _ in range(count):
            prompt = prompt_of(source, runner)
            runner.prefill(SLOTS, prompt)
            block = runner.read(SLOTS, 0, len(prompt))
            rows = source.randint(1, SLOTS)
            for row in range(rows):
                runner.write(row, 0, block)
            steps(runner, rows, [len(prompt)] * rows)
            runner.trim(SLOTS, 0)

    for length in range(2, LENGTH):  # every shape once
        runner.prefill(SLOTS, [5] * length)
    requests(60)

    def grown() -> int:
        before = resident_bytes()
        requests(240)
        return resident_bytes() - before

    # What leaks grows each time; the rest of a process of many tests may grow once.
    assert any(grown() < 3 * 2**20 for _ in range(3))
    first = runner.decode([5], [3])
    assert runner.decode([6], [4]).ctypes.data == first.ctypes.data
    runner.close()
