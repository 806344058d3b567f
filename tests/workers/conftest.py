"""Tokenizers of every kind, made once."""

from pathlib import Path

import pytest

from tests.tokenizers_by_hand import KINDS
from workers.words.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in KINDS.items():
        made[name] = tmp_path_factory.mktemp(name)
        make().save(str(made[name] / "tokenizer.json"))
    return made


@pytest.fixture(scope="session")
def by_kind(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def bpe(by_kind: dict[str, Tokenizer]) -> Tokenizer:
    return by_kind["byte_level"]
