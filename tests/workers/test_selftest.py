"""The self-test sees a runner that breaks a law, and says which; laws hold on the real one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.fake_runner import FakeBlock, FakeRunner, Logits
from workers.measuring.selftest import Law, measure, try_laws

VOCAB = 64


def broken(runner: Any) -> list[str]:
    return [law.name for law in try_laws(runner, VOCAB) if not law.holds]


def test_all_laws_hold_on_a_runner_that_keeps_them() -> None:
    laws = try_laws(FakeRunner(VOCAB), VOCAB)
    assert all(law.holds and law.tried for law in laws) and len(laws) == 7


class Neighbours(FakeRunner):
    """A row's logits depend on how many decode with it."""

    def decode(self, tokens: Any, lengths: Any) -> Logits:
        return super().decode(tokens, lengths) + np.float32(1e-3) * (len(tokens) > 1)


class Padding(FakeRunner):
    def prefill_together(self, first: int, prompts: Sequence[Sequence[int]]) -> Logits:
        logits = super().prefill_together(first, prompts)
        return logits + np.float32(1e-5) * (len(prompts) > 1)


class Chunks(FakeRunner):
    def extend(self, row: int, tokens: Sequence[int], start: int) -> None:
        super().extend(row, [*tokens[:-1], tokens[-1] ^ 1], start)


class Copies(FakeRunner):
    def copy(self, source: int, target: int, length: int) -> None:
        super().copy(source, target, length)
        self.kv[target, length - 1] += 1


class Blocks(FakeRunner):
    def write(self, row: int, start: int, block: FakeBlock) -> None:
        super().write(row, start, block)
        self.kv[row, start] += 1


class Places(FakeRunner):
    """What is replayed in another row is another thing."""

    def decode(self, tokens: Any, lengths: Any) -> Logits:
        logits = super().decode(tokens, lengths)
        logits[-1] += np.float32(1e-3) * (len(tokens) > 1 and len(self.calls) > 20)
        return logits


class Numbers(FakeRunner):
    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> Logits:
        return np.full_like(super().prefill(row, tokens, start), np.nan)


@pytest.mark.parametrize(
    ("runner", "laws"),
    [
        (Neighbours, {"a batch as each row alone", "replayed by decode steps as undisturbed"}),
        (Padding, {"prompts together as each alone"}),
        (Chunks, {"a prompt in chunks as whole"}),
        (Copies, {"on a copied prefix as on its own"}),
        (Blocks, {"on a prefix kept aside as on its own"}),
        (Places, {"replayed by decode steps as undisturbed"}),
        (Numbers, {"logits are numbers", "prompts together as each alone"}),
    ],
)
def test_each_broken_law_is_named(runner: type[FakeRunner], laws: set[str]) -> None:
    assert set(broken(runner(VOCAB))) == laws


def test_a_broken_law_tells_where_and_how_far() -> None:
    law = next(law for law in try_laws(Neighbours(VOCAB, slots=3), VOCAB) if not law.holds)
    assert law.where == "row 0 of 3, step 0" and law.difference == pytest.approx(1e-3, rel=0.01)


def test_what_one_slot_cannot_try_is_not_called_broken() -> None:
    laws = {law.name: law for law in try_laws(FakeRunner(VOCAB, slots=1, staging=1), VOCAB)}
    assert all(law.holds for law in laws.values())
    short = try_laws(FakeRunner(VOCAB, max_length=16, slots=2), VOCAB)
    assert all(law.holds for law in short)


def test_a_device_that_cuts_prompts_at_a_grain_is_asked_for_its_cuts_only() -> None:
    class Grained(FakeRunner):
        grain = 16

        def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> Logits:
            assert start % self.grain == 0
            return super().prefill(row, tokens, start)

        def extend(self, row: int, tokens: Sequence[int], start: int) -> None:
            assert (start + len(tokens)) % self.grain == 0
            super().extend(row, tokens, start)

    assert all(law.holds and law.tried for law in try_laws(Grained(VOCAB), VOCAB))


def test_speed_is_measured_for_as_many_rows_as_there_are() -> None:
    speed = measure(FakeRunner(VOCAB, slots=4), VOCAB)
    assert set(speed.decode) == {1, 4} and all(rate > 0 for rate in speed.decode.values())
    assert speed.prefill > 0 and 0 < speed.prompt <= 64


def test_a_law_without_comparisons_is_not_tried() -> None:
    assert Law("any", 0).holds and not Law("any", 1, float("nan")).holds
