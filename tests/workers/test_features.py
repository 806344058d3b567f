"""What `models check` says of a model is what its graph and files say."""

import json
import shutil
from pathlib import Path

import pytest

from workers.folders.folder import TINY, ModelFolder
from workers.folders.prepare import prepare
from workers.loading.features import Features, wording_facts
from workers.loading.wording import Wording

MODELS = Path(__file__).parents[1] / "parity/models"


def features(name: str, folder: Path, **config: object) -> Features:
    shutil.copytree(MODELS / name, folder, ignore=shutil.ignore_patterns("*.penstock-*"))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return Features.of(ModelFolder.load(folder), prepare(folder))


def test_windows_and_caps_are_seen(tmp_path: Path) -> None:
    gemma = features("gemma2", tmp_path / "m")
    assert gemma.sliding_window == "16 tokens in 1 of 2 layers"
    assert gemma.softcap == "attention 2, logits"
    plain = features("llama", tmp_path / "l")
    assert (plain.sliding_window, plain.softcap, plain.weights) == (None, None, "not quantized")
    assert plain.heads == "4 for 2 of keys and values"


def test_quantized_blocks_are_seen(tmp_path: Path) -> None:
    assert features("qwen3-int4", tmp_path / "m").weights == "int4 in blocks of 32"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3, factor 8.0"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, None),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "linear"),
    ],
)
def test_scaled_positions_are_seen(config: dict[str, object], told: str, tmp_path: Path) -> None:
    found = features("llama", tmp_path / "m", architectures=["LlamaForCausalLM"], **config)
    assert (found.rope_scaling, found.architecture) == (told, "LlamaForCausalLM")


def test_the_words_are_seen() -> None:
    words = wording_facts(Wording.load(TINY))
    assert words["chat_template"] == "one for all" and words["end_tokens"]
