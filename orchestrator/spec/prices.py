"""What tokens cost: a price table in YAML, refused at the door where it is malformed.

    currency: USD
    qwen2.5-7b: {prompt: 0.10, cached: 0.05, completion: 0.40}    # per million tokens

Knows nothing of jobs or of where tokens are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import SpecError
from orchestrator.spec import document
from orchestrator.spec.document import Document
from orchestrator.spec.refusals import show

CURRENCY = "USD"
_MILLION = 1_000_000
_KEYS = ("prompt", "cached", "completion")


@dataclass(frozen=True, slots=True)
class Price:
    """Of a million tokens each; `cached` of those of the prompt that were not computed."""

    prompt: float
    cached: float
    completion: float


@dataclass(frozen=True, slots=True)
class Prices:
    """The table, by model; `currency` is the code of ISO 4217."""

    currency: str
    models: Mapping[str, Price]

    def cost(self, model: str, prompt: int, cached: int, completion: int) -> float | None:
        """Of so many tokens, `cached` being some of `prompt`; None: the model has no price."""
        price = self.models.get(model)
        if price is None:
            return None
        computed = (prompt - cached) * price.prompt + cached * price.cached
        return (computed + completion * price.completion) / _MILLION


def read_prices(path: str | Path) -> Prices:
    """The table in the file at `path`; an empty path is an empty table.

    `cached` costs what `prompt` does unless it is given. Raises SpecError with file, line and key.
    """
    if not str(path):
        return Prices(CURRENCY, {})
    read = document.read(_text(Path(path)), file=str(path))
    table = read.mapping((), read.value)
    currency = read.text(
        ("currency",), table.get("currency", CURRENCY), "a currency like 'USD'", "[A-Z]{3}"
    )
    models = [model for model in table if model != "currency"]
    return Prices(currency, {model: _price(read, model, table[model]) for model in models})


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(document.MAX_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(str(path), "text in UTF-8", "other bytes") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(str(path), "a table of prices", reason.lower()) from None


def _price(read: Document, model: str, value: object) -> Price:
    given = read.mapping((model,), value, _KEYS)
    for key in ("prompt", "completion"):
        if key not in given:
            raise read.refusal((model,), f"a key '{key}'", "none")
    amounts = {key: _amount(read, (model, key), given[key]) for key in given}
    return Price(amounts["prompt"], amounts.get("cached", amounts["prompt"]), amounts["completion"])


def _amount(read: Document, path: tuple[str, str], value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MILLION:
        raise read.refusal(path, "a price of a million tokens, 0 or more", show(value))
    return float(value)
