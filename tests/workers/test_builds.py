"""Builds in other precisions keep the laws, and the edit is good for CUDA's.

int4, int8, w8a8 and fp16.

What is quantized need not say what `transformers` says. But a row alone is bitwise the row in a
batch, and a prompt in pieces is bitwise the whole. The CPU provider runs the fp16 form for CUDA
where no norm is fused into the attention; of the others the fixtures hold the graph alone.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.workers.test_parity import MODELS
from tests.workers.test_row_quantized import row_quantized
from workers.folders.folder import ModelFolder
from workers.folders.graph_edit import LAST, LENGTHS, TOTAL, edit
from workers.running.runner import Runner

QUANTIZED = [
    f"{name}-{kind}" for name in ("llama3", "qwen3", "gemma2") for kind in ("int4", "int8")
]
ROW_QUANTIZED = [
    f"{name}-w8a8" for name in ("llama3", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "smollm3")
]
HALF = ("phi4-fp16", "gemma2-fp16")
HALF_GRAPHS = ("qwen3-fp16-graph", "gemma3-fp16-graph")
LENGTHS_OF_ROWS = (1, 2, 5, 17, 33, 40)  # beyond windows of 16
STEPS = 6
CONTEXT = 64


@pytest.fixture(scope="module", params=[*QUANTIZED, *ROW_QUANTIZED, *HALF])
def runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("build") / "model"
    if request.param in ROW_QUANTIZED:
        row_quantized(MODELS / request.param.removesuffix("-w8a8"), folder)
    else:
        shutil.copytree(MODELS / request.param, folder)
    runner = Runner(folder, slots=len(LENGTHS_OF_ROWS), max_length=CONTEXT, threads=1)
    yield runner
    runner.close()


def prompts(vocab: int, seed: int = 3) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, length).tolist() for length in LENGTHS_OF_ROWS]


def run(runner: Runner, rows: list[list[int]]) -> list[np.ndarray]:
    """The logits [rows, V] of the prompts and of STEPS tokens after each, decoded together."""
    logits = [np.stack([runner.prefill(slot, row) for slot, row in enumerate(rows)])]
    lengths = np.array([len(row) for row in rows], np.int32)
    for step in range(STEPS):
        tokens = lengths * 7 % 100  # of the row alone, whoever its neighbours are
        logits.append(runner.decode(tokens, lengths + step).copy())
    return logits


def test_a_row_alone_is_bitwise_the_row_in_the_batch(runner: Runner) -> None:
    rows = prompts(runner.vocab_size)
    together = run(runner, rows)
    assert all(np.isfinite(logits).all() and logits.std() > 0.1 for logits in together)
    for at, row in enumerate(rows):
        for step, logits in enumerate(run(runner, [row])):
            np.testing.assert_array_equal(logits[0], together[step][at], err_msg=f"row {at}")


def test_a_prompt_in_pieces_is_bitwise_the_whole_prompt(runner: Runner) -> None:
    prompt = prompts(runner.vocab_size)[-1]
    whole, after = runner.prefill(0, prompt), runner.decode([7], [len(prompt)]).copy()
    for size in (2, 3, 16, 19):
        cuts = list(range(0, len(prompt) - 1, size))
        for start, end in zip(cuts, [*cuts[1:], len(prompt)], strict=True):
            logits = runner.prefill(1, prompt[start:end], start)
        np.testing.assert_array_equal(logits, whole, err_msg=f"pieces of {size}")
        runner.copy(1, 0, len(prompt))
        np.testing.assert_array_equal(runner.decode([7], [len(prompt)]), after)


@pytest.mark.parametrize("name", HALF)
def test_half_precision_says_about_what_single_does(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(MODELS / name, tmp_path / name)
    runner = Runner(folder, slots=1, max_length=CONTEXT, threads=1)
    with np.load(MODELS / f"expected_{name.partition('-')[0]}.npz") as stored:
        prompt, logits = stored["prompts"][-1].tolist(), stored["logits"][-1, 0]
    np.testing.assert_allclose(runner.prefill(0, prompt), logits, rtol=0, atol=0.02 * logits.std())


# Operators of the runtime's own that are named as if they were of ONNX.
OF_THE_RUNTIME = {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}


def check(model: onnx.ModelProto) -> None:
    """ONNX's own checks, types and shapes included, with weights of zero."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for node in whole.graph.node:
        if node.op_type in OF_THE_RUNTIME:
            node.domain = "com.microsoft"
    for tensor in whole.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            size = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = bytes(size)
    onnx.checker.check_model(whole, full_check=True)


@pytest.mark.parametrize("name", [*HALF, *HALF_GRAPHS])
@pytest.mark.parametrize("context", [32, 128])
def test_half_precision_for_cuda_is_edited_to_a_whole_graph(name: str, context: int) -> None:
    folder = ModelFolder.load(MODELS / name)
    model = onnx.load(str(folder.graph), load_external_data=False)
    before = {output.name: output.type.tensor_type.elem_type for output in model.graph.output}
    edit(folder, model, context=context)
    check(model)
    graph = model.graph
    named = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        assert named.issuperset(filter(None, node.input)), node.name
        named.update(node.output)
    assert {LENGTHS, TOTAL, LAST} <= named and "attention_mask" not in named
    assert "If" not in {node.op_type for node in graph.node}
    logits = next(output for output in graph.output if output.name == "logits")
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == [
        "batch_size",
        folder.vocab_size,
    ]
    assert {o.name: o.type.tensor_type.elem_type for o in graph.output} == before
