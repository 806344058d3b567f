"""The first layers of a prepared graph, as a graph of their own to be timed.

A model of many gigabytes is many times the same layer: what is true of a few of them about threads
and batch sizes is true of all, at a small part of the time and memory. The embedding is cut off
(its rows become an input), and so is the language head.

Knows nothing of onnxruntime: bytes of a graph out, whose external weights stay where they are.
"""

from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from workers.folders.folder import ModelFolder
from workers.measuring.costs import sources, step_costs

HIDDEN = "hidden"
_EMBEDDING = {"Gather": 0, "GatherBlockQuantized": 2}  # op: the input that has the output's type
_NORM = "LayerNormalization"


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A graph of `layers` layers that takes `hidden` [B, S, width] in place of tokens."""

    graph: bytes
    layers: int
    width: int
    weight_bytes: int
    past: dict[str, str]  # name of the past: name of its present


def first_layers(folder: ModelFolder, model: ModelProto, least_bytes: int) -> Excerpt | None:
    """As few layers of `model`, which is changed, as have `least_bytes` of weights; else all but
    the last. None where the graph is not of the kind that can be cut."""
    graph = model.graph
    width = _width(graph)
    if folder.layers < 2 or width is None or not _cut_embedding(graph, width):
        return None
    for layers in range(1, folder.layers):
        nodes = _behind(graph, set(_present(folder, layers)))
        part = GraphProto(node=nodes, initializer=_used(graph, nodes))
        weight_bytes = step_costs(part).weight_bytes
        if weight_bytes >= least_bytes or layers == folder.layers - 1:
            past = dict(zip(_past(folder, layers), _present(folder, layers), strict=True))
            _keep(graph, part, set(past.values()))
            return Excerpt(model.SerializeToString(), layers, width, weight_bytes, past)
    return None


def _past(folder: ModelFolder, layers: int) -> list[str]:
    return [p % i for i in range(layers + 1) for p in (folder.past_key, folder.past_value)]


def _present(folder: ModelFolder, layers: int) -> list[str]:
    """Layer `layers` only computes its keys and values, which need all layers before it."""
    return [p % i for i in range(layers + 1) for p in (folder.present_key, folder.present_value)]


def _width(graph: GraphProto) -> int | None:
    """Elements of a hidden row: those of the first norm's weights."""
    sizes = {each.name: list(each.dims) for each in graph.initializer}
    for node in graph.node:
        if node.op_type.endswith(_NORM):
            return next((sizes[n][0] for n in node.input if len(sizes.get(n, [])) == 1), None)
    return None


def _cut_embedding(graph: GraphProto, width: int) -> bool:
    """The rows that the embedding looks up become an input; False where there is none."""
    weights = {each.name: each for each in graph.initializer}
    kinds = {name: weights[of].data_type for name, of in sources(graph, weights).items()}
    for node in graph.node:
        if node.op_type in _EMBEDDING and "input_ids" in node.input:
            kind = kinds.get(node.input[_EMBEDDING[node.op_type]], TensorProto.FLOAT)
            for reader in graph.node:
                for i, name in enumerate(reader.input):
                    if name == node.output[0]:
                        reader.input[i] = HIDDEN
            info = helper.make_tensor_value_info(HIDDEN, kind, ["batch", "length", width])
            graph.input.append(info)
            return True
    return False


def _behind(graph: GraphProto, wanted: set[str]) -> list[NodeProto]:
    """The nodes that `wanted` are computed from, in the graph's order."""
    found = []
    needed = set(wanted)
    for node in reversed(graph.node):
        if needed & set(node.output):
            found.append(node)
            needed.update(node.input)
    return found[::-1]


def _used(graph: GraphProto, nodes: list[NodeProto]) -> list[TensorProto]:
    names = {name for node in nodes for name in node.input}
    return [each for each in graph.initializer if each.name in names]


def _keep(graph: GraphProto, part: GraphProto, outputs: set[str]) -> None:
    read = {name for node in part.node for name in node.input}
    inputs = [each for each in graph.input if each.name in read]
    kept = [each for each in graph.output if each.name in outputs]
    for field, values in (
        (graph.node, list(part.node)),
        (graph.initializer, list(part.initializer)),
        (graph.input, inputs),
        (graph.output, kept),
        (graph.value_info, []),
    ):
        del field[:]
        field.extend(values)
