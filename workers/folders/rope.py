"""Long rope: one table of positions for a session, where a graph chooses one for each call.

Models with long rope (Phi-3, Phi-4) have two tables, for texts up to the length they were first
trained with and for longer ones. The builder's graph takes one by the longest row of the batch, so
that a row's output would depend on its neighbours. Here the choice is made once, by the positions
that a row may have at most: docs/decisions/0019-families.md. Knows protobuf alone.
"""

from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper


def switch_length(graph: GraphProto) -> int | None:
    """The length beyond which the graph takes its long table; None where it has no two tables."""
    found = _switch(graph)
    return found[1] if found else None


def choose_table(graph: GraphProto, context: int) -> None:
    """Replace the choice by the table for rows of up to `context` positions."""
    found = _switch(graph)
    if found is None:
        return
    node, length = found
    wanted = "then_branch" if context > length else "else_branch"
    branch = next(a.g for a in node.attribute if a.name == wanted)
    values = {inner.output[0]: _constant(inner) for inner in branch.node}
    for outer, inner in zip(node.output, branch.output, strict=True):
        table = TensorProto()
        table.CopyFrom(values[inner.name])
        table.name = outer
        graph.initializer.append(table)
    graph.node.remove(node)


def _switch(graph: GraphProto) -> tuple[NodeProto, int] | None:
    """The If on `Greater(total length, constant)` with tables in its branches, and the constant."""
    producer = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        condition = producer.get(node.input[0]) if node.op_type == "If" else None
        if condition is None or condition.op_type != "Greater" or not _is_table(node):
            continue
        length = _scalar(graph, producer, condition.input[1])
        if length is not None:
            return node, length
    return None


def _is_table(node: NodeProto) -> bool:
    branches = [attribute.g for attribute in node.attribute]
    return all(inner.op_type == "Constant" for branch in branches for inner in branch.node)


def _scalar(graph: GraphProto, producer: dict[str, NodeProto], name: str) -> int | None:
    tensors = [each for each in graph.initializer if each.name == name]
    if name in producer and producer[name].op_type == "Constant":
        tensors.append(_constant(producer[name]))
    return int(numpy_helper.to_array(tensors[0])) if tensors else None


def _constant(node: NodeProto) -> TensorProto:
    value: TensorProto = helper.get_attribute_value(node.attribute[0])
    return value
