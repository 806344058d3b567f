"""Does a model keep the laws on this device, and how fast is it: `penstock models check`.

Every law compares logits bit for bit, on prompts and greedy continuations of the model itself:
what holds here is what resuming, batching and reuse of prefixes rest upon (docs/models.md). Knows
the runner's surface and numpy; nothing of jobs, sampling or files.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.engine.protocols import Logits, TokenRunner

Prompt = list[int]
ROWS = 8
STEPS = 8
_LONGEST = 48  # tokens of the prompts that laws are tried with
_SECONDS = 1.0  # what each measurement of speed may take, about
_MOST_PROMPT = 512


@dataclass(frozen=True, slots=True)
class Law:
    """`difference`: the largest one between logits that ought to be the same bits.

    `tried`: how many comparisons there were; none where the context or the slots are too few.
    """

    name: str
    tried: int
    difference: float = 0.0
    where: str = ""

    @property
    def holds(self) -> bool:
        return self.difference == 0


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second: of a prompt, and of `decode[rows]` rows that go on together."""

    prefill: float
    prompt: int
    decode: dict[int, float]


@dataclass(frozen=True, slots=True)
class _Run:
    """A prompt and what a row alone made of it: logits `[steps + 1, vocab]`, tokens `[steps]`."""

    prompt: Prompt
    logits: Logits
    tokens: Prompt


def try_laws(runner: TokenRunner, vocab: int) -> list[Law]:
    """Every law in turn. `vocab`: ids of prompts are drawn below it."""
    steps = max(min(STEPS, runner.max_length - 8), 1)
    length = max(_LONGEST, 2 * _grain(runner) + 16)
    rows = min(ROWS, runner.slots)
    prompts = _prompts(rows, max(min(length, _room(runner, rows) - steps), 1), vocab)
    alone = [_alone(runner, prompt, steps) for prompt in prompts]
    longest = max(alone, key=lambda run: len(run.prompt))
    return [
        _finite(alone),
        _law("a batch as each row alone", _together(runner, alone)),
        _law("prompts together as each alone", _prefilled_together(runner, alone)),
        _law("a prompt in chunks as whole", _chunked(runner, longest)),
        _law("on a copied prefix as on its own", _copied(runner, longest)),
        _law("on a prefix kept aside as on its own", _kept(runner, longest)),
        _law("replayed by decode steps as undisturbed", _replayed(runner, alone)),
    ]


def _room(runner: TokenRunner, rows: int) -> int:
    """Positions that each of so many rows may fill."""
    return min(runner.max_length, runner.capacity // rows)


def _grain(runner: TokenRunner) -> int:
    """Prompts may be cut at its multiples only; 1 on the host."""
    return int(getattr(runner, "grain", 1))


def _prompts(rows: int, longest: int, vocab: int) -> list[Prompt]:
    """Of different lengths, the longest first; the same ids every time."""
    random = np.random.default_rng(0)
    lengths = [max(longest - longest * row // (rows + 1), 2) for row in range(rows)]
    return [random.integers(0, vocab, length).tolist() for length in lengths]


def _alone(runner: TokenRunner, prompt: Prompt, steps: int) -> _Run:
    logits, tokens = [runner.prefill(0, prompt)], list[int]()
    for step in range(steps):
        tokens.append(int(logits[-1].argmax()))
        logits.append(_decode(runner, [tokens[-1]], [len(prompt) + step])[0])
    return _Run(prompt, np.stack(logits), tokens)


def _together(runner: TokenRunner, alone: Sequence[_Run]) -> Iterator[tuple[str, float]]:
    for row, run in enumerate(alone):
        yield f"prompt {row}", _apart(runner.prefill(row, run.prompt), run.logits[0])
    yield from _continued(runner, alone)


def _continued(runner: TokenRunner, alone: Sequence[_Run]) -> Iterator[tuple[str, float]]:
    """The rows lie there after their prompts: they take the tokens that they took alone."""
    for step in range(len(alone[0].tokens)):
        tokens = [run.tokens[step] for run in alone]
        logits = _decode(runner, tokens, [len(run.prompt) + step for run in alone])
        for row, run in enumerate(alone):
            yield (
                f"row {row} of {len(alone)}, step {step}",
                _apart(logits[row], run.logits[step + 1]),
            )


def _prefilled_together(runner: TokenRunner, alone: Sequence[_Run]) -> Iterator[tuple[str, float]]:
    logits = runner.prefill_together(0, [run.prompt for run in alone])
    for row, run in enumerate(alone):
        yield f"row {row}", _apart(logits[row], run.logits[0])


def _chunked(runner: TokenRunner, run: _Run) -> Iterator[tuple[str, float]]:
    length, grain = len(run.prompt), _grain(runner)
    cuts = {cut - cut % grain for cut in (2, length // 3, length // 2, length - 2)}
    for first in sorted(cut for cut in cuts if 2 <= cut <= length - 2):
        runner.extend(0, run.prompt[:first], 0)
        logits = runner.prefill(0, run.prompt[first:], first)
        yield f"{first} + {length - first} tokens", _apart(logits, run.logits[0])


def _copied(runner: TokenRunner, run: _Run) -> Iterator[tuple[str, float]]:
    """What is computed last stands in the last row, far from where it came from."""
    last = runner.slots + runner.staging - 1
    yield from _reused(runner, run, lambda length: runner.copy(0, last, length), last)


def _kept(runner: TokenRunner, run: _Run) -> Iterator[tuple[str, float]]:
    last = runner.slots + runner.staging - 1
    yield from _reused(
        runner, run, lambda length: runner.write(last, 0, runner.read(0, 0, length)), last
    )


def _reused(
    runner: TokenRunner, run: _Run, reuse: Callable[[int], None], row: int
) -> Iterator[tuple[str, float]]:
    length = len(run.prompt) // 2
    length -= length % _grain(runner)
    if length < 2 or row == 0:
        return
    runner.prefill(0, run.prompt)
    reuse(length)
    logits = runner.prefill(row, run.prompt[length:], length)
    yield f"{length} tokens", _apart(logits, run.logits[0])


def _replayed(runner: TokenRunner, alone: Sequence[_Run]) -> Iterator[tuple[str, float]]:
    """The rows change places, so that each has other neighbours and other memory."""
    turned = [*alone[1:], alone[0]]
    for row, run in enumerate(turned):
        runner.prefill(row, run.prompt)
    yield from _continued(runner, turned)


def _finite(alone: Sequence[_Run]) -> Law:
    whole = all(bool(np.isfinite(run.logits).all()) for run in alone)
    return Law("logits are numbers", len(alone), 0.0 if whole else float("nan"))


def _law(name: str, compared: Iterator[tuple[str, float]]) -> Law:
    """The first comparison that fails tells where, the largest how far."""
    seen = list(compared)
    apart = [(where, difference) for where, difference in seen if difference != 0]
    largest = max((difference for _, difference in apart), default=0.0)
    return Law(name, len(seen), largest, apart[0][0] if apart else "")


def _apart(one: Logits, other: Logits) -> float:
    """0 where they are the same bits."""
    if np.array_equal(one.view(np.uint32), other.view(np.uint32)):
        return 0.0
    return float(np.abs(one - other).max()) or float("inf")


def _decode(runner: TokenRunner, tokens: Prompt, lengths: list[int]) -> Logits:
    logits: npt.NDArray[np.float32] = np.asarray(runner.decode(tokens, lengths))
    return logits[: len(tokens)].copy()


def measure(runner: TokenRunner, vocab: int) -> Speed:
    """Speed at 1, 4 and 8 rows, as far as there are slots; a few seconds."""
    rows = [count for count in (1, 4, 8) if count <= runner.slots]
    length = max(min(_MOST_PROMPT, _room(runner, rows[-1]) // 2), 1)
    prompt = _prompts(1, length, vocab)[0]
    short = prompt[: max(min(length, 32), 1)]
    first = _timed(lambda: runner.prefill(0, short))
    taken = max(min(length, int(len(short) * _SECONDS / first)), len(short))
    seconds = min(_timed(lambda: runner.prefill(0, prompt[:taken])) for _ in range(2))
    decode = {count: _decode_speed(runner, prompt[:taken], count) for count in rows}
    return Speed(taken / seconds, taken, decode)


def _decode_speed(runner: TokenRunner, prompt: Prompt, rows: int) -> float:
    """The median step, at the prompt's length or a little beyond."""
    for row in range(1, rows):
        runner.copy(0, row, len(prompt))
    began, steps = time.perf_counter(), list[float]()
    for step in range(min(64, _room(runner, rows) - len(prompt))):
        tokens, lengths = [prompt[0]] * rows, [len(prompt) + step] * rows
        steps.append(_timed(lambda t=tokens, n=lengths: runner.decode(t, n)))  # type: ignore[misc]
        if time.perf_counter() - began > _SECONDS and len(steps) > 2:
            break
    return rows / float(np.median(steps[1:] or steps))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)
