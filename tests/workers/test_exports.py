"""Exports of the optimum kind: the graph that is named, the same tokens as the builder's graph."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from orchestrator.errors import NotFound, WorkerError
from tests.parity import optimum
from workers.folders.exports import choose, graphs
from workers.folders.folder import TINY, BrokenFolder, ModelFolder, find_model, list_models
from workers.folders.prepare import prepare
from workers.running.runner import Runner
from workers.words.chat import eos_token_ids
from workers.words.tokenizer import Tokenizer

LLAMA = Path(__file__).parents[1] / "parity/models/llama"
PROMPTS = ([5, 6, 7, 8, 9], [201, 17], [40] * 23, [3, 1, 4, 1, 5, 9, 2, 6])
STEPS = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return optimum.export(LLAMA, tmp_path_factory.mktemp("exports") / "llama")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "llama")


def greedy(folder: Path) -> tuple[list[list[int]], np.ndarray]:
    """The tokens of all prompts, decoded together, and the logits `[steps, rows, vocab]`."""
    runner = Runner(folder, slots=len(PROMPTS), max_length=64, threads=1)
    logits = [np.stack([runner.prefill(row, prompt) for row, prompt in enumerate(PROMPTS)])]
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    while len(logits) < STEPS:
        logits.append(np.array(runner.decode(logits[-1].argmax(axis=-1), lengths)))
        lengths += 1
    together = np.stack(logits)
    runner.close()
    return together.argmax(axis=-1).T.tolist(), together


@pytest.fixture(scope="module")
def builders(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], np.ndarray]:
    """What the builder's own graph of the same weights says."""
    return greedy(shutil.copytree(LLAMA, tmp_path_factory.mktemp("builder") / "llama"))


@pytest.mark.parametrize("graph", ["model", "model_fused"])
def test_an_export_has_the_tokens_of_the_builders_graph(
    folder: Path, graph: str, builders: tuple[list[list[int]], np.ndarray]
) -> None:
    choose(folder, graph)
    tokens, logits = greedy(folder)
    assert tokens == builders[0]
    np.testing.assert_allclose(logits, builders[1], atol=1e-4)


def test_half_precision_is_near(folder: Path, builders: tuple[list[list[int]], np.ndarray]) -> None:
    choose(folder, "model_fp16")
    np.testing.assert_allclose(greedy(folder)[1][0], builders[1][0], atol=0.2)


def test_rows_of_an_export_do_not_depend_on_their_neighbours_nor_on_chunks(folder: Path) -> None:
    choose(folder, "model")
    runner = Runner(folder, slots=3, max_length=64, threads=1)
    prompt = PROMPTS[2]
    alone = runner.prefill(0, prompt)
    after = runner.decode([7], [len(prompt)])[0].copy()
    together = runner.prefill_together(0, [PROMPTS[0], prompt, PROMPTS[3]])
    np.testing.assert_array_equal(together[1], alone)
    lengths = [len(PROMPTS[0]), len(prompt), len(PROMPTS[3])]
    np.testing.assert_array_equal(runner.decode([9, 7, 8], lengths)[1], after)
    runner.extend(2, prompt[:9], 0)
    np.testing.assert_array_equal(runner.prefill(2, prompt[9:], 9), alone)
    runner.close()


def test_the_facts_come_from_config_json(folder: Path) -> None:
    choose(folder, "model_fp16.onnx")
    found, builder = ModelFolder.load(folder), ModelFolder.load(LLAMA)
    sizes = ("context_length", "vocab_size", "layers", "kv_heads", "head_size", "past_key")
    assert [getattr(found, each) for each in sizes] == [getattr(builder, each) for each in sizes]
    assert found.graph == folder / "onnx/model_fp16.onnx"
    assert eos_token_ids(folder, Tokenizer(folder)) == eos_token_ids(LLAMA, Tokenizer(LLAMA))


def test_the_end_is_in_config_json_where_nothing_else_tells_it(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 8]}))
    assert {7, 8} <= eos_token_ids(folder, Tokenizer(folder))


def test_heads_that_are_not_told_are_derived(folder: Path) -> None:
    choose(folder, "model")
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    found = ModelFolder.load(folder)
    heads = config["num_attention_heads"]
    assert (found.kv_heads, found.head_size) == (heads, config["hidden_size"] // heads)


def test_of_several_graphs_one_must_be_chosen(folder: Path) -> None:
    with pytest.raises(WorkerError) as error:
        ModelFolder.load(folder)
    told = str(error.value)
    assert "model, model_fp16, model_fused, model_plain" in told and "--graph NAME" in told
    with pytest.raises(WorkerError, match="no graph 'model_q4': expected one of model, "):
        choose(folder, "model_q4")


def test_the_only_graph_needs_no_choice(folder: Path) -> None:
    for name in ("model", "model_fp16", "model_plain"):
        (folder / f"onnx/{name}.onnx").unlink()
    assert ModelFolder.load(folder).graph.stem == "model_fused"


def test_a_choice_keeps_what_else_was_said(folder: Path) -> None:
    (folder / "penstock.json").write_text('{"tool_format": "hermes"}')
    choose(folder, "model")
    said = json.loads((folder / "penstock.json").read_text())
    assert said == {"tool_format": "hermes", "graph": "onnx/model.onnx"}
    assert sorted(os.listdir(folder)) == sorted(["penstock.json", *os.listdir(folder)][1:])


def test_the_prepared_graph_lies_beside_the_original_and_is_no_choice(folder: Path) -> None:
    choose(folder, "model")
    before = set(graphs(folder))
    assert prepare(folder).parent == folder / "onnx"
    assert set(graphs(folder)) == before


def test_each_precision_is_a_model_of_its_own(folder: Path) -> None:
    digests = set()
    for name in ("model", "model_fp16"):
        choose(folder, name)
        digests.add(ModelFolder.load(folder).digest())
    assert len(digests) == 2
    last = ModelFolder.load(folder).digest()
    (folder / "onnx/model.onnx_data").write_bytes(b"another")
    assert ModelFolder.load(folder).digest() == last
    data = folder / "onnx/model_fp16.onnx_data"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    assert ModelFolder.load(folder).digest() != last


def test_concatenated_caches_are_refused_with_the_command_that_converts(folder: Path) -> None:
    choose(folder, "model_plain")
    with pytest.raises(WorkerError) as error:
        prepare(folder)
    command = "penstock models import someone/small-llama --precision fp32 --device cpu -o"
    assert "GroupQueryAttention" in str(error.value) and f"{command} {folder}-fp32" in str(
        error.value
    )


def test_quantization_by_the_whole_batch_is_refused(folder: Path) -> None:
    choose(folder, "model")
    file = folder / "onnx/model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    names = [f"quantized/{part}" for part in ("values", "scale", "zero")]
    model.graph.node.append(onnx.helper.make_node("DynamicQuantizeLinear", ["logits"], names))
    file.write_bytes(model.SerializeToString())
    with pytest.raises(WorkerError, match="a row's numbers depend on the other rows"):
        prepare(folder)


def test_without_the_sources_name_the_command_says_what_is_missing(folder: Path) -> None:
    choose(folder, "model_plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/m"}))
    with pytest.raises(
        WorkerError, match=r"models import SOURCE .*the Hugging Face folder or name"
    ):
        prepare(folder)


def test_missing_or_truncated_weights_are_refused(folder: Path) -> None:
    choose(folder, "model")
    data = folder / "onnx/model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(WorkerError, match="truncated"):
        prepare(folder)
    data.unlink()
    with pytest.raises(WorkerError, match=r"weights file model.onnx_data is missing"):
        prepare(folder)


def test_models_for_more_than_text_and_configs_without_sizes_are_refused(folder: Path) -> None:
    choose(folder, "model")
    config = json.loads((folder / "config.json").read_text())
    for changed, reason in (
        (config | {"vision_config": {}}, "vision_config: not supported"),
        ({**config, "num_hidden_layers": None}, "num_hidden_layers: expected a whole number"),
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(WorkerError, match=reason):
            ModelFolder.load(folder)


def test_exports_are_listed_and_found_by_name(folder: Path) -> None:
    models = folder.parent
    assert isinstance(list_models(models)[1], BrokenFolder)
    choose(folder, "model")
    assert list_models(models) == [ModelFolder.load(TINY, "tiny"), ModelFolder.load(folder)]
    assert find_model("llama", models) == ModelFolder.load(folder)


def test_what_only_can_be_imported_is_refused_with_the_import(folder: Path) -> None:
    shutil.rmtree(folder / "onnx")
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(WorkerError, match=f"penstock models import {folder} --precision int4"):
        find_model(str(folder), folder.parent)
    with pytest.raises(NotFound):
        find_model("other", folder.parent)
