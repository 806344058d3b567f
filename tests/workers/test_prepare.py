"""Preparing a model: the original is never touched, what is not whole or not known is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from orchestrator.errors import NotFound, WorkerError
from workers.folders.folder import ModelFolder, find_model
from workers.folders.prepare import prepare
from workers.running.runner import Runner

LLAMA = Path(__file__).parents[1] / "parity/models/llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "llama"
    shutil.copytree(LLAMA, copy, ignore=shutil.ignore_patterns("*.penstock-*"))
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def change_graph(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_the_prepared_graph_lies_beside_the_original_which_is_not_touched(folder: Path) -> None:
    before = contents(folder)
    prepared = prepare(folder)
    assert prepared.parent == folder.resolve()
    assert contents(folder) == before | {prepared.name: prepared.read_bytes()}
    made_at = prepared.stat().st_mtime_ns
    assert prepare(folder) == prepared and prepared.stat().st_mtime_ns == made_at


def test_a_changed_original_is_prepared_anew(folder: Path) -> None:
    first = prepare(folder)
    change_graph(folder, lambda model: setattr(model, "doc_string", "another"))
    assert prepare(folder) != first


def test_a_folder_that_cannot_be_written_is_prepared_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workers.folders.prepare as module

    write, cache = module.write_whole, tmp_path / "cache"

    def only_the_cache(file: Path, data: bytes, *, mode: int) -> None:
        # root may write anywhere, so the refusal of a read-only folder is raised here
        if file.parent == folder.resolve():
            raise PermissionError(13, "Permission denied", str(file.parent))
        write(file, data, mode=mode)

    monkeypatch.setattr(module, "write_whole", only_the_cache)
    before = contents(folder)
    elsewhere = Runner(folder, slots=1, max_length=32, threads=1, cache=cache)
    assert contents(folder) == before and len(list(cache.iterdir())) == 1
    monkeypatch.undo()
    beside = Runner(folder, slots=1, max_length=32, threads=1)
    np.testing.assert_array_equal(elsewhere.prefill(0, [5, 6, 7]), beside.prefill(0, [5, 6, 7]))


def refusal(folder: Path) -> str:
    before = contents(folder)
    with pytest.raises(WorkerError) as error:
        Runner(folder, slots=1, max_length=32, threads=1)
    assert error.value.code == "model"
    assert contents(folder) == before
    return str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "genai_config.json"])
def test_a_folder_without_a_needed_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_truncated_graph_is_refused(folder: Path, part: float) -> None:
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: int(len(whole) * part)])
    assert "not a whole ONNX file" in refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.onnx.data"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated: weight" in refusal(folder)


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "a/../../secret"])
def test_external_data_outside_the_folder_is_refused(folder: Path, location: str) -> None:
    def point_outside(model: onnx.ModelProto) -> None:
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location

    change_graph(folder, point_outside)
    assert "lies outside the folder" in refusal(folder)


def test_a_link_that_leads_outside_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    data = folder / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    assert "lies outside the folder" in refusal(folder)


def test_missing_weights_are_refused_by_name(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    assert "weights file model.onnx.data is missing" in refusal(folder)


def test_an_unknown_attention_operator_is_named(folder: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.op_type = "PagedAttention"

    change_graph(folder, rename)
    assert "expected GroupQueryAttention, found ['PagedAttention']" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("token_type_ids", "found input 'token_type_ids'"),
        ("inputs_embeds", "its embedding is another graph"),
        ("encoder_hidden_states", "it reads an encoder's output"),
        ("past.0.conv", "layers with a recurrent state"),
        ("past.3.recurrent", "layers with a recurrent state"),
        ("block_table", "it keeps its cache in pages"),
        ("q_proj.lora_A.weight", "it takes an adapter's weights"),
        ("past_key_values.0.key_scale", "its cache is quantized"),
    ],
)
def test_an_unknown_input_is_named_with_what_it_means(folder: Path, name: str, why: str) -> None:
    def add(model: onnx.ModelProto) -> None:
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b"])
        model.graph.input.append(value)

    change_graph(folder, add)
    said = refusal(folder)
    assert f"found input {name!r}" in said and why in said


@pytest.mark.parametrize("name", ["MoE", "QMoE", "DynamicQuantizeLinear"])
def test_what_ties_a_row_to_its_neighbours_is_refused(folder: Path, name: str) -> None:
    def add(model: onnx.ModelProto) -> None:
        model.graph.node.insert(0, onnx.helper.make_node(name, ["input_ids"], ["experts"]))

    change_graph(folder, add)
    assert f"found {name}, after which a row's numbers depend on the other rows" in refusal(folder)


def test_positions_that_nobody_reads_are_left_out(folder: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        value = onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["b"])
        model.graph.input.append(value)

    change_graph(folder, add)
    prepared = onnx.load(str(prepare(folder)), load_external_data=False)
    assert "position_ids" not in {value.name for value in prepared.graph.input}


def test_a_graph_that_reads_its_mask_for_more_than_lengths_is_refused(folder: Path) -> None:
    def read_the_mask(model: onnx.ModelProto) -> None:
        model.graph.output.add().CopyFrom(model.graph.output[0])
        model.graph.output[-1].name = "also"
        model.graph.node.append(
            onnx.helper.make_node("Cast", ["attention_mask"], ["also"], to=onnx.TensorProto.FLOAT)
        )

    change_graph(folder, read_the_mask)
    assert "an attention mask that gives lengths alone" in refusal(folder)


def windows(graph: onnx.GraphProto) -> list[int]:
    """The window of each layer, -1 for none; no cache of a window's size among them."""
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    attributes = [{a.name: a for a in node.attribute} for node in nodes]
    assert not any("sliding_window_cache" in each for each in attributes)
    return [each["local_window_size"].i for each in attributes]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mistral", [16, 16]), ("phi3", [24, 24]), ("gemma2", [16, -1]), ("gemma3", [16, 16, -1])],
)
def test_windows_are_the_models_own(tmp_path: Path, name: str, expected: list[int]) -> None:
    """Also where the builder forgets them, and none is taken for the size of a cache."""
    folder = shutil.copytree(LLAMA.parent / name, tmp_path / name)
    assert windows(onnx.load(str(prepare(folder)), load_external_data=False).graph) == expected


def test_no_window_is_given_to_a_family_that_has_none(folder: Path) -> None:
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["sliding_window"] = {"window_size": 16, "layers": []}
    file.write_text(json.dumps(config))
    prepared = onnx.load(str(prepare(folder)), load_external_data=False)
    assert windows(prepared.graph) == [-1, -1]


def test_long_rope_has_one_table_by_the_context_of_the_session(tmp_path: Path) -> None:
    folder = shutil.copytree(LLAMA.parent / "phi3", tmp_path / "phi3")
    short, long = prepare(folder, context=32), prepare(folder, context=33)
    assert short.stem.endswith("-short32") and long.stem.endswith("-long32")
    assert prepare(folder, context=16) == short and prepare(folder) == long
    for file, positions in ((short, 32), (long, 128)):
        graph = onnx.load(str(file), load_external_data=False).graph
        assert "If" not in {node.op_type for node in graph.node}
        table = next(each for each in graph.initializer if each.name == "cos_cache")
        assert list(table.dims) == [positions, 8]


def test_a_graph_that_loads_and_cannot_run_here_is_refused_at_once(folder: Path) -> None:
    def norms_inside_the_attention(model: onnx.ModelProto) -> None:
        # what the builder makes for CUDA: no such input on the CPU provider
        norm = onnx.numpy_helper.from_array(np.ones(16, np.float32), "norm")
        model.graph.initializer.append(norm)
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.input.extend(["", "", "", "", "", "norm", "norm"][len(node.input) - 9 :])

    change_graph(folder, norms_inside_the_attention)
    assert "q_norm_weight / k_norm_weight inputs are not supported" in refusal_after_load(folder)


def refusal_after_load(folder: Path) -> str:
    with pytest.raises(WorkerError) as error:
        Runner(folder, slots=1, max_length=32, threads=1)
    return str(error.value)


def test_a_wrong_value_in_the_configuration_is_named(folder: Path) -> None:
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["head_size"] = "sixteen"
    file.write_text(json.dumps(config))
    assert "head_size: expected a whole number, got 'sixteen'" in refusal(folder)


def test_a_decoder_file_outside_the_folder_is_refused(folder: Path) -> None:
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["filename"] = "../llama/../model.onnx"
    file.write_text(json.dumps(config))
    assert "is not a file of the folder" in refusal(folder)


def test_an_unknown_device_is_refused_not_imitated(folder: Path) -> None:
    with pytest.raises(WorkerError, match="tpu") as error:
        Runner(folder, slots=1, max_length=32, device="tpu")
    assert error.value.code == "device"


def test_models_are_found_by_name_and_by_path(folder: Path, tmp_path: Path) -> None:
    assert find_model("llama", tmp_path).path == folder.resolve()
    assert find_model(str(folder), Path("nowhere")).name == "llama"
    assert find_model("tiny", tmp_path).name == "tiny"
    with pytest.raises(NotFound, match="model 'absent' does not exist"):
        find_model("absent", tmp_path)


def test_the_digest_follows_the_weights_and_not_the_prepared_graph(folder: Path) -> None:
    before = ModelFolder.load(folder).digest()
    prepare(folder)
    assert ModelFolder.load(folder).digest() == before
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[10] ^= 1
    (folder / "model.onnx.data").write_bytes(bytes(data))
    assert ModelFolder.load(folder).digest() != before
