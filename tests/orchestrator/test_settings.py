"""Settings: defaults, refusals that name the variable, a line in the docs for each."""

from dataclasses import fields
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.settings import PREFIX, Settings

DOCS = Path(__file__).parents[2] / "docs/settings.md"


def test_every_setting_is_documented_with_its_name() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for field in fields(Settings):
        assert f"| `{PREFIX}{field.name.upper()}` |" in text


def test_the_environment_overrides_the_defaults() -> None:
    settings = Settings.from_env({"PENSTOCK_SLOTS": "3", "PENSTOCK_FLUSH_SECONDS": "0.5", "A": "b"})
    assert (settings.slots, settings.flush_seconds) == (3, 0.5)
    assert Settings.from_env({}).database_url == "sqlite:///penstock.db"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PENSTOCK_SLOT", "3", "PENSTOCK_SLOT: expected PENSTOCK_SLOTS perhaps, got an unknown"),
        ("PENSTOCK_SLOTS", "-1", "PENSTOCK_SLOTS: expected a whole number from 0 to 4096, got '-1"),
        ("PENSTOCK_MAX_CONTEXT", "8", "PENSTOCK_MAX_CONTEXT: expected a whole number from 16 to"),
        ("PENSTOCK_MEMORY_PERCENT", "101", "PENSTOCK_MEMORY_PERCENT: expected a whole number from"),
        ("PENSTOCK_DETERMINISTIC", "yes", "PENSTOCK_DETERMINISTIC: expected 0 or 1, got 'yes'"),
        ("PENSTOCK_SLOTS", "many", "PENSTOCK_SLOTS: expected a whole number"),
        ("PENSTOCK_LEASE_SECONDS", "nan", "PENSTOCK_LEASE_SECONDS: expected seconds, more than 0"),
        ("PENSTOCK_LOG", "loud", "PENSTOCK_LOG: expected one of debug"),
        ("PENSTOCK_DATABASE_URL", "", "PENSTOCK_DATABASE_URL: expected a value"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(variable: str, value: str, message: str) -> None:
    with pytest.raises(SpecError) as refusal:
        Settings.from_env({variable: value})
    assert str(refusal.value).startswith(message)
