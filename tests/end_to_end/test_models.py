"""`penstock models` as a person types it: check, list, prepare, and what import refuses."""

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.shell import Shell
from tests.parity import optimum
from tests.workers.builder_stand_in import environment, source, write

LLAMA = Path(__file__).parents[1] / "parity/models/llama"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_check_shows_laws_speed_memory_and_features(shell: Shell) -> None:
    ended = shell("models", "check", "tiny", "--json")
    assert ended.code == 0, ended.err
    shown = json.loads(ended.out)
    assert len(shown["laws"]) == 7 and all(law["holds"] for law in shown["laws"])
    assert set(shown["decode_tokens_per_second"]) == {"1", "4", "8"}
    assert shown["kv_bytes_per_slot"] == shown["kv_bytes_per_token"] * shown["context_length"]
    assert shown["features"]["chat_template"] and shown["supported"]["chat"] == "yes"
    assert shown["device"].startswith("device cpu")


def test_check_is_read_by_people_too(shell: Shell) -> None:
    ended = shell("models", "check", "tiny")
    assert ended.code == 0, ended.err
    for line in ("a batch as each row alone", "prefill_tokens_per_second", "end_tokens"):
        assert line in ended.out
    assert ended.out.count("holds") == 7 and "BROKEN" not in ended.out


def test_an_export_is_chosen_checked_and_run_by_name(shell: Shell) -> None:
    optimum.export(LLAMA, shell.folder / "models/export")
    ended = shell("models", "list")
    assert ended.code == 0 and "broken: export: " in ended.out and "several graphs" in ended.out
    assert shell("models", "check", "export").code == 1
    ended = shell("models", "prepare", "export", "--graph", "model")
    assert ended.code == 0 and "onnx/model.penstock-" in ended.out
    ended = shell("models", "check", "export", "--json")
    assert ended.code == 0, ended.err
    assert all(law["holds"] for law in json.loads(ended.out)["laws"])
    listed = json.loads(shell("models", "list", "--json").out)
    assert [row["error"] for row in listed] == [None, None]
    ended = shell("models", "check", "export", "--graph", "model_plain")
    assert ended.code == 1 and "penstock models import someone/small-llama" in ended.err


def test_a_graph_is_chosen_of_exports_only(shell: Shell) -> None:
    ended = shell("models", "prepare", "tiny", "--graph", "model")
    assert ended.code == 2 and "--graph: expected a folder with several graphs" in ended.err


def test_import_refuses_at_the_door(shell: Shell) -> None:
    hf = source(shell.folder / "hf")
    for words, reason in (
        (("hf", "--precision", "bf16"), "bf16: the CPU provider has no attention operator"),
        (("hf", "--precision", "int5"), "--precision: expected one of fp32"),
        (("hf", "--precision", "int4", "--extra", "use_paged_attention=1"), "PagedAttention"),
        (("./none", "--precision", "int4"), "'./none' does not exist"),
        (("hf", "--precision", "int4", "--builder-python", "none"), "a Python interpreter"),
    ):
        ended = shell("models", "import", *words, "-o", "models/m")
        assert (ended.code, ended.out) == (2, "") and reason in ended.err
    write(hf / "config.json", {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8})
    ended = shell("models", "import", "hf", "--precision", "int4", "-o", "models/m")
    assert ended.code == 2 and "mixture of experts (num_local_experts: 8)" in ended.err
    assert not (shell.folder / "models").exists()


def test_import_tries_what_it_made_and_says_what_comes_next(shell: Shell) -> None:
    source(shell.folder / "hf")
    python = environment(shell.folder / "venv")
    words = ["hf", "--precision", "fp32", "-o", "models/m", "--builder-python", str(python)]
    ended = shell("models", "import", *words)
    assert (ended.code, ended.out) == (0, "models/m\n"), ended.err
    assert "tried: 7 laws hold" in ended.err
    assert "next: penstock models check models/m --device cpu" in ended.err
    again = shell("models", "import", *words)
    assert again.code == 2 and "--force" in again.err
    assert shell("models", "check", "m").code == 0


def test_an_imported_model_without_a_template_says_so(shell: Shell) -> None:
    hf = source(shell.folder / "hf")
    for folder in (hf, hf / "built"):
        (folder / "chat_template.jinja").unlink()
        write(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    python = environment(shell.folder / "venv")
    words = ["hf", "--precision", "fp32", "-o", "models/m", "--builder-python", str(python)]
    ended = shell("models", "import", *words)
    assert ended.code == 1 and "it has no chat template" in ended.err
    assert (shell.folder / "models/m/model.onnx").exists()
    shutil.copy(LLAMA / "chat_template.jinja", shell.folder / "models/m")
    assert shell("models", "check", "m").code == 0
