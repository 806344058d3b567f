"""What a model's files show of it: windows, caps, rotation, quantization, words.

For people, in `penstock models check`. Read from the graph and the JSON beside it; knows nothing
of sessions.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import NodeProto, helper

from workers.building.sources import rotations
from workers.folders.configs import read_object
from workers.folders.folder import ModelFolder
from workers.loading.wording import Wording


@dataclass(frozen=True, slots=True)
class Features:
    """Each a short text, or None where the model has none of it."""

    architecture: str | None
    weights: str
    heads: str
    sliding_window: str | None
    softcap: str | None
    rope_scaling: str | None

    @classmethod
    def of(cls, folder: ModelFolder, graph: Path) -> "Features":
        """Of the prepared `graph` of `folder`."""
        nodes = list(onnx.load(str(graph), load_external_data=False).graph.node)
        attention = [_attributes(node) for node in nodes if node.op_type == "GroupQueryAttention"]
        file = folder.path / "config.json"
        config = read_object(file) if file.is_file() else {}
        named = config.get("architectures")
        return cls(
            architecture=str(named[0]) if isinstance(named, list) and named else None,
            weights=_weights(nodes),
            heads=f"{attention[0]['num_heads']} for {folder.kv_heads} of keys and values",
            sliding_window=_windows([int(each.get("local_window_size", -1)) for each in attention]),
            softcap=_softcap(nodes, attention),
            rope_scaling=_rope(config),
        )


def wording_facts(wording: Wording) -> dict[str, str | None]:
    """How the model reads and writes: its template, its calls, its ends."""
    both = "with another for tools" if wording.template.tool_source else "one for all"
    ends = [f"{id} {wording.tokenizer.token(id)!r}" for id in sorted(wording.eos)]
    return {
        "chat_template": both,
        "tool_calls": wording.calls.name if wording.calls else None,
        "end_tokens": ", ".join(ends) or None,
    }


def _attributes(node: NodeProto) -> dict[str, float]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _weights(nodes: list[NodeProto]) -> str:
    blocks = Counter(
        f"int{_attributes(node).get('bits', 4)} in blocks of {_attributes(node)['block_size']}"
        for node in nodes
        if node.op_type == "MatMulNBits"
    )
    columns = sum(node.op_type == "MatMulIntegerToFloat" for node in nodes)
    blocks.update({"int8 by column, rows in int8": columns} if columns else {})
    return ", ".join(kind for kind, _ in blocks.most_common()) or "not quantized"


def _windows(sizes: list[int]) -> str | None:
    seen = [size for size in sizes if size > 0]
    if not seen:
        return None
    where = "every layer" if len(seen) == len(sizes) else f"{len(seen)} of {len(sizes)} layers"
    return f"{max(seen)} tokens in {where}"


def _softcap(nodes: list[NodeProto], attention: list[dict[str, float]]) -> str | None:
    caps = [f"attention {each['softcap']:g}" for each in attention if each.get("softcap")][:1]
    made_by = {output: node for node in nodes for output in node.output}
    node = made_by.get("logits")
    while node is not None and node.op_type in ("Mul", "Cast", "Where"):
        node = made_by.get(node.input[0])
    caps += ["logits"] if node is not None and node.op_type == "Tanh" else []
    return ", ".join(caps) or None


def _rope(config: dict[str, object]) -> str | None:
    for _, kind, told in rotations(config):
        if kind != "default":
            factor = f", factor {told['factor']}" if "factor" in told else ""
            return f"{kind}{factor}"
    return None
