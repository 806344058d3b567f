"""int8 by row and column: the formula, what is kept of the model, and what a processor must do.

That rows do not depend on their neighbours is shown in test_builds.py, for every family.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from orchestrator.errors import WorkerError
from tests.workers.test_parity import MODELS
from workers.folders.row_quantized import DATA, LEAST, probe, quantize
from workers.running import host
from workers.running.runner import Runner

FAMILIES = ("llama3", "qwen2", "qwen3", "gemma2", "phi3")


def row_quantized(fp32: Path, folder: Path) -> Path:
    """A w8a8 model in the new `folder`."""
    folder.mkdir()
    quantize(fp32 / "model.onnx", folder)
    for file in fp32.iterdir():
        if "onnx" not in file.name:
            shutil.copyfile(file, folder / file.name)
    return folder


def product(matrix: np.ndarray, folder: Path) -> Path:
    """A graph of one MatMul with `matrix`, its weights in a file of their own."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", matrix.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", matrix.shape[1]])],
        [numpy_helper.from_array(matrix, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="weights"
    )
    return folder / "model.onnx"


def test_a_product_is_that_of_the_formula(tmp_path: Path) -> None:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((160, 48)).astype(np.float32)
    matrix[:, 5] = 0
    rows = random.standard_normal((7, 160)).astype(np.float32) * 10.0 ** np.arange(-3, 4)[:, None]
    rows = rows.astype(np.float32)
    rows[3] = 0
    (tmp_path / "made").mkdir()
    assert quantize(product(matrix, tmp_path), tmp_path / "made") == 1
    session = ort.InferenceSession(tmp_path / "made" / "model.onnx")
    found = session.run(None, {"x": rows})[0]

    scale = np.maximum(np.abs(matrix).max(axis=0) / np.float32(127), np.float32(2.0**-100))
    largest = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(2.0**-100))
    w = np.rint(matrix / scale).astype(np.int64)
    q = np.rint((rows / largest) / np.float32(1 / 127)).astype(np.int64)
    assert np.abs(w).max() == np.abs(q).max() == 127
    expected = (q @ w) * largest.astype(float) * (scale.astype(float) / 127)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
    assert (found[3] == 0).all() and (found[:, 5] == 0).all()
    # and it is near what it stands for, in each row's own size
    error = np.abs(found - rows @ matrix).max(axis=1) / (largest[:, 0] + 1e-30)
    assert error.max() < 0.5


def test_small_matrices_and_what_is_no_weight_stay(tmp_path: Path) -> None:
    matrix = np.ones((8, LEAST // 8 - 1), np.float32)
    (tmp_path / "made").mkdir()
    with pytest.raises(ValueError, match="no MatMul with a constant matrix"):
        quantize(product(matrix, tmp_path), tmp_path / "made")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_says_nearly_what_it_said_in_fp32(family: str, tmp_path: Path) -> None:
    folder = row_quantized(MODELS / family, tmp_path / "w8a8")
    whole = shutil.copytree(MODELS / family, tmp_path / "fp32")
    prompt = np.random.default_rng(5).integers(0, 100, 40).tolist()
    logits = []
    for each in (whole, folder):
        runner = Runner(each, slots=1, max_length=64, threads=1)
        logits.append(runner.prefill(0, prompt).astype(float))
        runner.close()
    exact, found = logits
    assert np.corrcoef(exact, found)[0, 1] > 0.99
    assert np.abs(found - exact).max() < 0.3 * exact.std() * 3
    assert not np.array_equal(exact, found)


def test_every_matrix_is_a_byte_a_weight(tmp_path: Path) -> None:
    folder = row_quantized(MODELS / "llama3", tmp_path / "w8a8")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert "MatMul" not in kinds and "MatMulIntegerToFloat" in kinds
    held = {each.name: each for each in model.graph.initializer}
    matrices = [each for each in held.values() if each.data_type == TensorProto.INT8]
    assert len(matrices) == kinds.count("MatMulIntegerToFloat")
    end = max(int(x.value) for each in matrices for x in each.external_data if x.key == "offset")
    assert end < (folder / DATA).stat().st_size
    named = {tuple(each.dims) for each in matrices}
    exact = onnx.load(MODELS / "llama3" / "model.onnx", load_external_data=False)
    products = {node.input[1] for node in exact.graph.node if node.op_type == "MatMul"}
    assert named == {tuple(e.dims) for e in exact.graph.initializer if e.name in products}


def test_this_processor_is_exact() -> None:
    graph, rows, expected = probe()
    found = ort.InferenceSession(graph).run(None, {"q": rows})[0]
    assert (found == expected).all()


def test_a_processor_that_is_not_exact_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = row_quantized(MODELS / "qwen3", tmp_path / "w8a8")
    graph, rows, expected = probe()
    # A kernel that saturates gives less: as if more had been due.
    monkeypatch.setattr(host, "probe", lambda: (graph, rows, expected + 1))
    with pytest.raises(WorkerError, match="not exact on this processor"):
        Runner(folder, slots=1, max_length=64, threads=1)
