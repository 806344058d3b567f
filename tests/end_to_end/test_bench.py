"""`penstock bench` as a person uses it: real runs of the embedded model, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import SpecError
from tests.end_to_end.shell import Shell
from workers.folders.folder import TINY, ModelFolder
from workers.measuring.costs import step_costs

QUICK = ("bench", "tiny", "--quick", "--seconds", "1")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run says, in JSON; stderr has the talk."""
    shell = Shell(tmp_path_factory.mktemp("bench"))
    ended = shell(*QUICK, "--rows", "1,2,4", "--prompts", "8,32", "--threads", "1", "--json")
    assert ended.code == 0, ended.err
    assert "decode, round 3 of 3" in ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_the_rows_and_prompts_that_were_asked_for(shown: dict[str, Any]) -> None:
    assert [each["rows"] for each in shown["decode"]] == [1, 2, 4]
    assert [each["tokens"] for each in shown["prefill"]] == [8, 32]
    assert shown["model"] == "tiny"
    assert 0 <= shown["others_share"] <= 1


def test_medians_lie_between_the_least_and_the_most(shown: dict[str, Any]) -> None:
    spreads = [
        each[key]
        for table in ("decode", "prefill")
        for each in shown[table]
        for key in each
        if isinstance(each[key], dict)
    ]
    assert len(spreads) == 3 * 2 + 2 * 2
    assert all(0 < each["least"] <= each["median"] <= each["most"] for each in spreads)
    assert all(0 < each["gap_p50_ms"] <= each["gap_p99_ms"] for each in shown["decode"])


def test_fractions_follow_from_the_ceilings_and_the_graph(shown: dict[str, Any]) -> None:
    """Counted here anew: bytes of weights and KV, multiplications. No bound from above: the tiny
    model's weights lie in the cache, which is faster than the memory."""
    costs = step_costs(onnx.load(ModelFolder.load(TINY).graph, load_external_data=False).graph)
    ceilings, kv = shown["ceilings"], shown["memory"]["kv_bytes_per_token"]
    for row in shown["decode"]:
        held = shown["held_tokens"] + row["steps"] // 6
        read = costs.weight_bytes + row["rows"] * held * kv
        seconds = {
            "bandwidth": read / ceilings["read_bandwidth"],
            "arithmetic": 2 * row["rows"] * costs.multiply_adds / ceilings["fp32_rate"],
        }
        assert row["limit"] == max(seconds, key=seconds.__getitem__)
        steps = row["bare_tokens_per_second"]["median"] / row["rows"]
        assert row["fraction"] == pytest.approx(steps * max(seconds.values()), rel=1e-6)
        assert row["fraction"] > 0


def test_memory_adds_up(shown: dict[str, Any]) -> None:
    memory, folder = shown["memory"], ModelFolder.load(TINY)
    a_token = 2 * folder.layers * folder.kv_heads * folder.head_size * 4
    assert memory["kv_bytes_per_token"] == a_token
    assert memory["kv_bytes_per_slot"] == a_token * memory["context_length"]
    assert memory["resident_bytes"] > 10 << 20
    assert memory["slots"] >= 4


def test_what_it_ran_with_is_said(shown: dict[str, Any]) -> None:
    assert shown["calibration"]["threads"] == 1
    assert "1 thread" in shown["device"]
    assert set(shown["versions"]) == {"penstock", "onnxruntime", "numpy", "python"}
    assert shown["machine"]["cores"] >= 1


def test_the_tables_for_people_and_both_names(shell: Shell) -> None:
    ended = shell("models", *QUICK, "--rows", "2", "--prompts", "8")
    assert ended.code == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    firsts = [line[0] for line in lines if line]
    assert firsts[:3] == ["fact", "model", "measured"]
    assert firsts[-4:] == ["rows", "2", "prompt", "8"]
    assert "ceilings" in firsts


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("--rows", "0", "--rows: expected numbers of at least 1, got '0'"),
        ("--rows", "1,x", "--rows: expected whole numbers between commas, such as 1,4,8"),
        ("--rows", "", "--rows: expected whole numbers between commas"),
        ("--rows", "1,,2", "--rows: expected whole numbers between commas"),
        ("--rows", "-1", "--rows: expected whole numbers"),
        ("--prompts", "1.5", "--prompts: expected whole numbers"),
        ("--prompts", "12345678", "--prompts: expected whole numbers"),
    ],
)
def test_lists_that_are_none_are_refused_before_the_model_is_looked_for(
    option: str, text: str, said: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(said)):
        CliRunner().invoke(app, ["bench", "nowhere", option, text], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--seconds", "--threads", "--slots"])
def test_numbers_out_of_range_are_refused(option: str) -> None:
    ended = CliRunner().invoke(app, ["bench", "nowhere", option, "0"])
    assert ended.exit_code == 2
    assert option in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rows", "4", "--slots", "2"), "--rows: expected at most 2, for which there is memory"),
        (("--prompts", "99999"), "--prompts: expected less than the context of"),
    ],
    ids=("rows", "prompts"),
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], said: str, shell: Shell) -> None:
    ended = shell(*QUICK, *arguments)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err


def test_a_model_that_is_not_there_and_a_device_that_is_not(shell: Shell) -> None:
    missing = shell("bench", "nowhere")
    assert (missing.code, missing.out) == (2, "")
    assert "nowhere" in missing.err
    device = shell(*QUICK, "--device", "abacus")
    assert (device.code, device.out) == (1, "")
    assert "abacus" in device.err
