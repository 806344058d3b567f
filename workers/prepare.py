"""The graph edit: a builder's decoder -> the same decoder with a length for each row.

Two changes, after which rows of any lengths share one call (docs/decisions/0004-graph-edit.md):
`seqlens_k` and `total_sequence_length` become inputs of every GroupQueryAttention and the
attention mask goes; one hidden row a sequence is gathered in front of the language head, so that
prefill computes one row of logits. The weights stay where they are: the edited graph is a small
file beside the original, or in the cache where the folder cannot be written; never the original.

Knows protobuf (through `onnx`), nothing of sessions or of memory.
"""

import hashlib
import os
import tempfile
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from orchestrator.errors import WorkerError
from workers.folder import ModelFolder

PREPARE_VERSION = 1
LENGTHS, TOTAL, LAST = "seqlens_k", "total_sequence_length", "last_index"
_HEADS = {"MatMul", "MatMulNBits", "Gemm"}
_CACHE_OPS = {"PagedAttention", "MultiHeadAttention", "Attention", "SparseAttention"}


def prepare(path: Path, cache: Path | None = None) -> Path:
    """The path of the edited graph of the model folder `path`, made now or found.

    Raises WorkerError naming the operator or input that is not supported, a truncated file, or
    external data that is missing, too short or outside the folder.
    """
    folder = ModelFolder.load(path)
    name = f"{folder.graph.stem}.penstock-v{PREPARE_VERSION}-{_digest(folder.graph)}.onnx"
    places = [folder.path, *([cache] if cache else [])]
    for place in places:
        if (place / name).is_file():
            return place / name
    model = _load(folder)
    _check_external_data(folder, model.graph)
    edit(folder, model)
    for place in places:
        try:
            return _write(model, place, name)
        except OSError as error:
            refusal = error
    raise WorkerError("model", f"cannot write the prepared graph {name}: {refusal}")


def edit(folder: ModelFolder, model: ModelProto) -> None:
    """Edit `model` in place; raises WorkerError where the graph is not of the builder's kind."""
    graph = model.graph
    _lengths_as_inputs(folder, graph)
    _gather_last_row(folder, graph)
    _drop_dead_nodes(graph)
    inputs = [i for i in graph.input if i.name != "attention_mask"]
    _check_inputs(folder, [i.name for i in inputs])
    del graph.input[:]
    graph.input.extend(inputs)
    graph.input.extend(
        [
            helper.make_tensor_value_info(LENGTHS, TensorProto.INT32, ["batch_size"]),
            helper.make_tensor_value_info(TOTAL, TensorProto.INT32, []),
            helper.make_tensor_value_info(LAST, TensorProto.INT64, ["batch_size", 1]),
        ]
    )
    _reshape_ends(folder, graph)
    del graph.value_info[:]


def _lengths_as_inputs(folder: ModelFolder, graph: GraphProto) -> None:
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attention:
        other = sorted({n.op_type for n in graph.node if n.op_type in _CACHE_OPS})
        raise _unsupported(folder, f"GroupQueryAttention, found {other or 'no attention operator'}")
    if len(attention) != folder.layers:
        raise _unsupported(
            folder, f"one GroupQueryAttention a layer ({folder.layers}), found {len(attention)}"
        )
    for node in attention:
        if len(node.input) < 7 or not node.input[5] or not node.input[6]:
            raise _unsupported(folder, f"inputs seqlens_k and total length on node {node.name!r}")
        if not node.input[3]:
            raise _unsupported(folder, f"a past key on node {node.name!r}: shared KV buffers")
        node.input[5], node.input[6] = LENGTHS, TOTAL


def _gather_last_row(folder: ModelFolder, graph: GraphProto) -> None:
    producer = {output: node for node in graph.node for output in node.output}
    head = producer.get("logits")
    while head is not None and head.op_type not in _HEADS:
        head = producer.get(head.input[0]) if head.input else None
    if head is None:
        raise _unsupported(folder, "a language head (MatMul or MatMulNBits) that ends in 'logits'")
    gather = helper.make_node(
        "GatherND", [head.input[0], LAST], ["last_hidden"], "penstock/last_row", batch_dims=1
    )
    position = next(i for i, node in enumerate(graph.node) if node is head or node == head)
    head.input[0] = "last_hidden"
    graph.node.insert(position, gather)


def _drop_dead_nodes(graph: GraphProto) -> None:
    live = {output.name for output in graph.output}
    keep: list[NodeProto] = []
    for node in reversed(graph.node):
        if live.intersection(node.output):
            keep.append(node)
            live.update(name for name in node.input if name)
    nodes = keep[::-1]
    del graph.node[:]
    graph.node.extend(nodes)


def _check_inputs(folder: ModelFolder, names: list[str]) -> None:
    layers = range(folder.layers)
    past = {pattern % i for i in layers for pattern in (folder.past_key, folder.past_value)}
    for name in names:
        if name != "input_ids" and name not in past:
            raise _unsupported(
                folder, f"input_ids and the past of each layer, found input {name!r}"
            )
    missing = past - set(names)
    if missing:
        raise _unsupported(folder, f"input {sorted(missing)[0]!r}, found none of that name")


def _reshape_ends(folder: ModelFolder, graph: GraphProto) -> None:
    logits = next((output for output in graph.output if output.name == "logits"), None)
    if logits is None:
        raise _unsupported(folder, "an output 'logits', found none of that name")
    kind, width = logits.type.tensor_type.elem_type, logits.type.tensor_type.shape.dim[-1].dim_value
    logits.CopyFrom(helper.make_tensor_value_info("logits", kind, ["batch_size", width]))
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4:
            dims[2].dim_param = "max_length"


def _load(folder: ModelFolder) -> ModelProto:
    try:
        model = onnx.load(str(folder.graph), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise WorkerError(
            "model", f"{folder.graph}: not a whole ONNX file (truncated?): {error}"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise WorkerError("model", f"{folder.graph}: not a whole ONNX file: it has no nodes")
    return model


def _check_external_data(folder: ModelFolder, graph: GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = PurePosixPath(entry.get("location", ""))
        file = folder.path / location
        outside = location.is_absolute() or ".." in location.parts or "\0" in str(location)
        if outside or not file.resolve().is_relative_to(folder.path):
            raise WorkerError(
                "model",
                f"{folder.graph}: weight {tensor.name!r} lies outside the folder: "
                f"{str(location)!r}",
            )
        if not file.is_file():
            raise WorkerError("model", f"{folder.graph}: weights file {location} is missing")
        needed = sum(_bytes(folder, tensor, entry.get(key, "0")) for key in ("offset", "length"))
        if file.stat().st_size < needed:
            raise WorkerError(
                "model",
                f"{file}: truncated: weight {tensor.name!r} ends at byte {needed}, "
                f"the file has {file.stat().st_size}",
            )


def _bytes(folder: ModelFolder, tensor: TensorProto, value: str) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise WorkerError(
            "model", f"{folder.graph}: weight {tensor.name!r} lies at {value!r}: no whole number"
        )
    return int(value)


def _write(model: ModelProto, place: Path, name: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(model.SerializeToString())
        os.chmod(temporary, 0o644)
        os.replace(temporary, place / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return place / name


def _digest(graph: Path) -> str:
    with graph.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _unsupported(folder: ModelFolder, expected: str) -> WorkerError:
    return WorkerError("model", f"{folder.graph}: not supported: expected {expected}")
