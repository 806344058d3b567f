"""The graph edit: a decoder with one length for all -> the same decoder with a length for each row.

Two changes, after which rows of any lengths share one call (docs/decisions/0004-graph-edit.md):
`seqlens_k` and `total_sequence_length` become inputs of every GroupQueryAttention and the
attention mask goes; one hidden row a sequence is gathered in front of the language head, so that
prefill computes one row of logits. And what would make a row depend on its neighbours, or is not
what the model's authors meant, is put right (docs/decisions/0019-families.md).

Knows protobuf (through `onnx`) and names; nothing of files, sessions or memory.
"""

from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from orchestrator.errors import WorkerError
from workers.folders.exports import conversion
from workers.folders.folder import ModelFolder
from workers.folders.rope import choose_table

LENGTHS, TOTAL, LAST = "seqlens_k", "total_sequence_length", "last_index"
POSITIONS = "position_ids"  # of exports whose rotation is outside of the attention operator
_UNREAD = {"attention_mask", POSITIONS}  # these go, unless a node that lives reads them
_HEADS = {"MatMul", "MatMulNBits", "MatMulIntegerToFloat", "Gemm"}
# What a builder puts between the language head and the logits: bias, scale, mask, softcap, type.
_AFTER_HEAD = {"Add", "Mul", "Div", "Where", "Tanh", "Cast", "Reshape", "Identity"}
_CACHE_OPS = {"PagedAttention", "MultiHeadAttention", "Attention", "SparseAttention"}
# One scale for the whole batch; experts that compute together whatever rows chose them.
_TIE_ROWS = {
    "DynamicQuantizeLinear": "weights quantized by blocks (MatMulNBits)",
    "MoE": "a dense model",
    "QMoE": "a dense model",
}
# Inputs that say what a graph is, where it is no decoder of text by itself.
_OTHER_KINDS = (
    ("inputs_embeds", "its embedding is another graph (a stage of a model for pictures or sound)"),
    ("encoder", "it reads an encoder's output"),
    ("block_table", "it keeps its cache in pages (use_paged_attention)"),
    ("conv", "it has layers with a recurrent state"),
    ("recurrent", "it has layers with a recurrent state"),
    ("lora", "it takes an adapter's weights"),
    ("pixel_values", "it reads pictures"),
    ("input_features", "it reads sound"),
    ("scale", "its cache is quantized"),
)


def edit(folder: ModelFolder, model: ModelProto, *, context: int, window: int = 0) -> None:
    """Edit `model` in place; raises WorkerError where the graph is not one that can be edited.

    `context` positions are what a row may have at most: they choose a table of positions where
    the graph has two. `window` positions are what every layer sees, 0 to leave the graph's own.
    """
    graph = model.graph
    _check_inputs_known(folder, graph)
    _check_rows(folder, graph)
    _lengths_as_inputs(folder, graph)
    _set_windows(graph, window)
    choose_table(graph, context)
    _gather_last_row(folder, graph)
    _drop_dead(graph)
    _reshape_inputs(folder, graph)
    _reshape_ends(folder, graph)
    del graph.value_info[:]


def _check_rows(folder: ModelFolder, graph: GraphProto) -> None:
    """Refuse the operators after which a row's numbers depend on the rows beside it."""
    found = next((node.op_type for node in graph.node if node.op_type in _TIE_ROWS), None)
    if found:
        raise unsupported(
            folder,
            f"{_TIE_ROWS[found]}, found {found}, after which a row's numbers depend on the other "
            "rows",
        )


def attention_nodes(graph: GraphProto) -> list[NodeProto]:
    """The GroupQueryAttention nodes, in the order of the graph."""
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


def _lengths_as_inputs(folder: ModelFolder, graph: GraphProto) -> None:
    attention = attention_nodes(graph)
    if not attention:
        other = sorted({n.op_type for n in graph.node if n.op_type in _CACHE_OPS})
        found = f"found {other or 'no attention operator'}"
        how = conversion(folder.path, folder.graph)
        raise unsupported(folder, f"GroupQueryAttention, {found}; {how}")
    if len(attention) != folder.layers:
        raise unsupported(
            folder, f"one GroupQueryAttention a layer ({folder.layers}), found {len(attention)}"
        )
    for node in attention:
        if len(node.input) < 7 or not node.input[5] or not node.input[6]:
            raise unsupported(folder, f"inputs seqlens_k and total length on node {node.name!r}")
        if not node.input[3]:
            raise unsupported(folder, f"a past key on node {node.name!r}: shared KV buffers")
        node.input[5], node.input[6] = LENGTHS, TOTAL


def _set_windows(graph: GraphProto, window: int) -> None:
    """Rows are as long as the context, so no layer may take its cache for one of window's size."""
    for node in attention_nodes(graph):
        for attribute in [a for a in node.attribute if a.name == "sliding_window_cache"]:
            node.attribute.remove(attribute)
        local = next((a for a in node.attribute if a.name == "local_window_size"), None)
        if window and (local is None or local.i < 0):
            if local is not None:
                node.attribute.remove(local)
            node.attribute.append(helper.make_attribute("local_window_size", window))


def _gather_last_row(folder: ModelFolder, graph: GraphProto) -> None:
    producer = {output: node for node in graph.node for output in node.output}
    head = _head(producer, "logits")
    if head is None:
        raise unsupported(folder, "a language head (MatMul or MatMulNBits) that ends in 'logits'")
    hidden = _before_head(head, producer)
    gather = helper.make_node(
        "GatherND", [hidden, LAST], ["last_hidden"], "penstock/last_row", batch_dims=1
    )
    readers = [i for i, node in enumerate(graph.node) if hidden in node.input]
    for i in readers:
        for place, name in enumerate(graph.node[i].input):
            if name == hidden:
                graph.node[i].input[place] = "last_hidden"
    graph.node.insert(readers[0], gather)


def _before_head(head: NodeProto, producer: dict[str, NodeProto]) -> str:
    """The rows that the head multiplies, as they are before they are quantized for it."""
    if head.op_type != "MatMulIntegerToFloat":
        return str(head.input[0])
    scaled = producer[head.input[0]].input[0]  # of QuantizeLinear
    return str(producer[scaled].input[0])


def _head(producer: dict[str, NodeProto], name: str) -> NodeProto | None:
    node = producer.get(name)
    if node is None or node.op_type in _HEADS:
        return node
    if node.op_type not in _AFTER_HEAD:
        return None
    heads = (_head(producer, each) for each in node.input)
    return next((head for head in heads if head is not None), None)


def _drop_dead(graph: GraphProto) -> None:
    live = {output.name for output in graph.output}
    keep: list[NodeProto] = []
    for node in reversed(graph.node):
        if live.intersection(node.output):
            keep.append(node)
            live.update(_reads(node))
    for values, kept in (
        (graph.node, keep[::-1]),
        (graph.initializer, [each for each in graph.initializer if each.name in live]),
    ):
        del values[:]
        values.extend(kept)


def _reads(node: NodeProto) -> Iterator[str]:
    """Every name that a node takes from its graph, also inside of its branches."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for branch in (attribute.g, *attribute.graphs):
            for inner in branch.node:
                yield from _reads(inner)


def _check_inputs_known(folder: ModelFolder, graph: GraphProto) -> None:
    layers = range(folder.layers)
    past = {pattern % i for i in layers for pattern in (folder.past_key, folder.past_value)}
    names = {value.name for value in graph.input} - {each.name for each in graph.initializer}
    for name in sorted(names - past - {"input_ids"} - _UNREAD):
        why = next((f": {why}" for sign, why in _OTHER_KINDS if sign in name.lower()), "")
        raise unsupported(
            folder, f"input_ids and the past of each layer, found input {name!r}{why}"
        )
    missing = (past | {"input_ids"}) - names
    if missing:
        raise unsupported(folder, f"input {min(missing)!r}, found none of that name")


def _reshape_inputs(folder: ModelFolder, graph: GraphProto) -> None:
    read = {name for node in graph.node for name in _reads(node)}
    inputs = [i for i in graph.input if i.name not in _UNREAD or i.name in read]
    if any(value.name == "attention_mask" for value in inputs):
        raise unsupported(folder, "an attention mask that gives lengths alone, found more in it")
    del graph.input[:]
    graph.input.extend(inputs)
    graph.input.extend(
        [
            helper.make_tensor_value_info(LENGTHS, TensorProto.INT32, ["batch_size"]),
            helper.make_tensor_value_info(TOTAL, TensorProto.INT32, []),
            helper.make_tensor_value_info(LAST, TensorProto.INT64, ["batch_size", 1]),
        ]
    )


def _reshape_ends(folder: ModelFolder, graph: GraphProto) -> None:
    logits = next((output for output in graph.output if output.name == "logits"), None)
    if logits is None:
        raise unsupported(folder, "an output 'logits', found none of that name")
    kind, width = logits.type.tensor_type.elem_type, logits.type.tensor_type.shape.dim[-1].dim_value
    logits.CopyFrom(helper.make_tensor_value_info("logits", kind, ["batch_size", width]))
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4:
            dims[2].dim_param = "max_length"


def unsupported(folder: ModelFolder, expected: str) -> WorkerError:
    """The refusal of a graph, by what was expected of it."""
    return WorkerError("model", f"{folder.graph}: not supported: expected {expected}")
