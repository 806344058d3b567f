"""What a step reads and multiplies, counted by hand; and graphs cut after a few layers."""

import random
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import GraphProto, TensorProto, helper, numpy_helper

from workers.folders.folder import TINY, ModelFolder
from workers.folders.prepare import prepare
from workers.measuring.costs import step_costs, tensor_bytes
from workers.measuring.excerpt import HIDDEN, first_layers

VOCAB, WIDTH, BLOCK = 50, 32, 16


def graph(*nodes: onnx.NodeProto, **weights: np.ndarray) -> GraphProto:
    made = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return GraphProto(node=nodes, initializer=made)


def dense(rows: int, columns: int) -> np.ndarray:
    return np.zeros((rows, columns), np.float32)


def test_weights_are_read_once_and_an_embedding_row_by_row() -> None:
    found = step_costs(
        graph(
            helper.make_node("Gather", ["embedding", "input_ids"], ["a"]),
            helper.make_node("MatMul", ["a", "up"], ["b"]),
            helper.make_node("MatMul", ["b", "down"], ["c"]),
            helper.make_node("MatMul", ["c", "d"], ["scores"]),  # two that are computed
            helper.make_node("MatMul", ["c", "head"], ["logits"]),
            embedding=dense(VOCAB, WIDTH),
            up=dense(WIDTH, 8),
            down=dense(8, WIDTH),
            head=dense(WIDTH, VOCAB),
            unread=dense(1000, 1000),
        )
    )
    assert found.multiply_adds == 2 * WIDTH * 8 + WIDTH * VOCAB
    assert found.head_multiply_adds == WIDTH * VOCAB
    assert found.weight_bytes == 4 * found.multiply_adds
    assert not found.quantized


def test_a_tied_embedding_is_read_by_the_head() -> None:
    found = step_costs(
        graph(
            helper.make_node("Gather", ["embedding", "input_ids"], ["a"]),
            helper.make_node("Transpose", ["embedding"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["a", "turned"], ["logits"]),
            embedding=dense(VOCAB, WIDTH),
        )
    )
    assert (found.weight_bytes, found.multiply_adds) == (4 * VOCAB * WIDTH, VOCAB * WIDTH)


def test_quantized_weights_count_by_their_sizes_and_their_shape() -> None:
    found = step_costs(
        graph(
            helper.make_node(
                "MatMulNBits",
                ["a", "weights", "scales"],
                ["logits"],
                domain="com.microsoft",
                K=WIDTH,
                N=VOCAB,
                bits=4,
                block_size=BLOCK,
            ),
            weights=np.zeros((VOCAB, WIDTH // BLOCK, BLOCK // 2), np.uint8),
            scales=np.zeros(VOCAB * WIDTH // BLOCK, np.float32),
        )
    )
    assert found.quantized
    assert found.multiply_adds == found.head_multiply_adds == VOCAB * WIDTH
    assert found.weight_bytes == VOCAB * WIDTH // 2 + 4 * VOCAB * WIDTH // BLOCK


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (TensorProto.FLOAT, 60),
        (TensorProto.FLOAT16, 30),
        (TensorProto.BFLOAT16, 30),
        (TensorProto.INT8, 15),
        (TensorProto.UINT4, 8),
        (TensorProto.INT64, 120),
    ],
)
def test_the_bytes_of_a_tensor(kind: int, size: int) -> None:
    assert tensor_bytes(TensorProto(dims=[3, 5], data_type=kind)) == size


# --- excerpts -------------------------------------------------------------------------------------


def prepared(tmp_path: Path) -> tuple[ModelFolder, onnx.ModelProto]:
    folder = ModelFolder.load(TINY)
    return folder, onnx.load(prepare(TINY, tmp_path))


def feeds(session: ort.InferenceSession, folder: ModelFolder, length: int) -> dict[str, np.ndarray]:
    shape = (1, folder.kv_heads, length, folder.head_size)
    past = [each.name for each in session.get_inputs() if "past" in each.name]
    return {
        "seqlens_k": np.asarray([length - 1], np.int32),
        "total_sequence_length": np.asarray(length, np.int32),
        **{name: np.zeros(shape, np.float32) for name in past},
    }


def opened(graph: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def test_an_excerpt_computes_what_the_whole_graph_computes_in_these_layers(tmp_path: Path) -> None:
    """So it is those layers, whole, in their order: the last one's keys need all before them."""
    folder, model = prepared(tmp_path)
    seed = random.randrange(2**32)
    print("seed", seed)
    tokens = np.random.default_rng(seed).integers(0, folder.vocab_size, (1, 12))
    head = next(each for each in model.graph.initializer if "lm_head" in each.name)
    hidden = numpy_helper.to_array(head).T[tokens]  # the embedding is the head's, turned
    whole = opened(model.SerializeToString())
    excerpt = first_layers(folder, model, 1)
    assert excerpt is not None
    assert excerpt.layers == 1
    part = opened(excerpt.graph)
    assert {each.name for each in part.get_outputs()} == set(excerpt.past.values())
    wanted = list(excerpt.past.values())
    given = {"input_ids": tokens, "last_index": np.asarray([[11]])}
    expected = whole.run(wanted, feeds(whole, folder, 12) | given)
    found = part.run(wanted, feeds(part, folder, 12) | {HIDDEN: hidden})
    for name, one, other in zip(wanted, expected, found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, err_msg=name)


def test_an_excerpt_is_as_small_as_may_be_and_never_the_whole(tmp_path: Path) -> None:
    folder, model = prepared(tmp_path)
    sizes = []
    for least in (1, 10**6, 10**12):
        excerpt = first_layers(folder, prepared(tmp_path)[1], least)
        assert excerpt is not None
        sizes.append((excerpt.layers, excerpt.weight_bytes))
        assert excerpt.width == 128
    layers = [each[0] for each in sizes]
    assert layers[0] == 1 < layers[1] < layers[2] == folder.layers - 1
    assert sizes[1][1] >= 10**6
    assert sizes[2][1] < step_costs(model.graph).weight_bytes


def test_a_graph_without_an_embedding_or_norms_is_not_cut() -> None:
    folder = ModelFolder.load(TINY)
    bare = graph(helper.make_node("MatMul", ["x", "w"], ["present.0.key"]), w=dense(4, 4))
    assert first_layers(folder, helper.make_model(bare), 1) is None
