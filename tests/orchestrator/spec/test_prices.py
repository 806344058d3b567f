"""A table of prices: what tokens cost, and what is refused with its place."""

from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.prices import Prices, read_prices

TABLE = """
currency: EUR
tiny: {prompt: 0.1, cached: 0.05, completion: 0.4}
"large/one": {prompt: 2, completion: 8}
"""


def table(folder: Path, text: str) -> Prices:
    file = folder / "prices.yaml"
    file.write_text(text, encoding="utf-8")
    return read_prices(file)


def test_cached_tokens_cost_less_and_are_part_of_the_prompt(tmp_path: Path) -> None:
    prices = table(tmp_path, TABLE)
    assert prices.currency == "EUR"
    assert prices.cost("tiny", 1_000_000, 0, 0) == pytest.approx(0.1)
    assert prices.cost("tiny", 1_000_000, 1_000_000, 0) == pytest.approx(0.05)
    assert prices.cost("tiny", 3_000_000, 1_000_000, 500_000) == pytest.approx(0.2 + 0.05 + 0.2)
    assert prices.cost("large/one", 500_000, 250_000, 0) == pytest.approx(1.0)
    assert prices.cost("tiny", 0, 0, 0) == 0


def test_a_model_without_a_price_costs_nobody_knows_what(tmp_path: Path) -> None:
    assert table(tmp_path, TABLE).cost("other", 1, 0, 1) is None
    assert read_prices("").cost("tiny", 1, 0, 1) is None
    assert table(tmp_path, "tiny: {prompt: 0, completion: 0}").currency == "USD"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "expected a mapping"),
        ("tiny: 3", ":1: tiny: expected a mapping"),
        ("a: {prompt: 1, completion: 1}\ntiny: {prompt: 1}", ":2: tiny: expected a key 'comple"),
        ("tiny: {prompt: -1, completion: 1}", "tiny.prompt: expected a price"),
        ("tiny: {prompt: true, completion: 1}", "tiny.prompt: expected a price"),
        ("tiny: {prompt: '1', completion: 1}", "tiny.prompt: expected a price"),
        ("tiny: {prompt: 1, completion: 1, cache: 1}", "did you mean 'cached'"),
        ("currency: dollars", "currency: expected a currency"),
    ],
)
def test_a_malformed_table_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        table(tmp_path, text)
    assert said in str(refused.value)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="a table of prices"):
        read_prices(tmp_path / "none.yaml")
