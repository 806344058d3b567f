"""The benchmarks run: a smoke run of each on the embedded model, without peers; its figures.

Nothing here looks at a speed.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KINDS = ("decode", "mixed", "sweep", "fewshot", "everything", "single")


def run(script: str, *words: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench")
    words = ("--work", "all", "--quick", "--json", str(folder / "all.json"))
    printed = run("work.py", *words, "--work-folder", str(folder))
    written = json.loads((folder / "all.json").read_text())
    for table in written["tables"]:
        assert f"{table['title']} (reduced)" in printed
    return list(written["tables"])


def test_every_kind_of_work_has_its_tables(tables: list[dict[str, Any]]) -> None:
    found = Counter(table["facts"]["work"] for table in tables)
    assert found == {**dict.fromkeys(KINDS, 1), "decode": 4, "mixed": 2}


def test_each_system_has_speeds_and_its_ratio_to_the_first(tables: list[dict[str, Any]]) -> None:
    for table in tables:
        _, *others = table["rates"]
        assert set(table["ratios"]) == set(others)
        for name in table["rates"]:
            speed = table["rates"][name]["tokens/s"]
            assert 0 < speed["least"] <= speed["median"] <= speed["most"], (table["title"], name)


def test_the_whole_path_makes_the_tokens_of_the_bare_engine(tables: list[dict[str, Any]]) -> None:
    table = next(table for table in tables if table["facts"]["work"] == "everything")
    same, begun, total = table["agreement"]["whole path, greedy, SQLite"]
    assert (same, begun) == (2, total)


def test_the_first_token_of_a_chat_is_timed() -> None:
    printed = run("first_token.py", "--quick")
    assert {"idle", "busy"} <= {line.split()[0] for line in printed.splitlines() if line.strip()}


def test_a_work_is_what_its_kind_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import loads

    ids = loads.Ids(vocab=151_936, forbidden=(7,))
    for rows in (8, 16):
        mixed = loads.make("mixed", loads.SIZES["mixed"], rows, ids, seed=1)
        assert len(mixed.prompts) == 64 and mixed.rows == rows
        assert 16 <= min(mixed.limits) < 32 and 224 < max(mixed.limits) <= 256
    sweep = loads.make("sweep", loads.SIZES["sweep"], 16, ids, seed=1)
    assert Counter(map(tuple, sweep.prompts)).most_common(1)[0][1] == 16
    assert len(sweep.prompts) == 32 * 16 and {len(p) for p in sweep.prompts} == {256}
    assert len({loads.point(i) for i in range(16)}) == 16
    fewshot = loads.make("fewshot", loads.SIZES["fewshot"], 16, ids, seed=1)
    assert len({tuple(p[:1024]) for p in fewshot.prompts}) == 1
    assert len({p[1024] for p in fewshot.prompts}) > 60
    assert {len(p) for p in fewshot.prompts} == {1100}
    again = loads.make("fewshot", loads.SIZES["fewshot"], 16, ids, seed=1)
    assert again == fewshot != loads.make("fewshot", loads.SIZES["fewshot"], 16, ids, seed=2)
