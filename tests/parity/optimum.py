"""Rewrites a folder of the onnxruntime-genai builder as an export of the optimum kind.

The same weights in the form that optimum's and transformers.js's exporters leave: `config.json`
in place of `genai_config.json`, one graph for each precision in `onnx/`, with their weights beside
them, and graphs that ask for `attention_mask` and `position_ids`:

    model        rotation by operators of its own (RotaryEmbedding fed with position_ids)
    model_fused  rotation inside of GroupQueryAttention; position_ids is there, and nobody reads it
    model_fp16   `model` in half precision, logits too
    model_plain  no GroupQueryAttention: caches that grow by concatenation

The tests make one when they need it. By hand: python tests/parity/optimum.py SOURCE OUTPUT
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

WORDS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
POSITIONS = helper.make_tensor_value_info(
    "position_ids", TensorProto.INT64, ["batch_size", "sequence_length"]
)


def export(source: Path, output: Path) -> Path:
    """Writes the folder `output` from the builder's folder `source` (fp32); returns it."""
    (output / "onnx").mkdir(parents=True)
    for name in WORDS:
        shutil.copy(source / name, output / name)
    genai = json.loads((source / "genai_config.json").read_text())["model"]
    write_json(output / "config.json", config_of(genai))
    write_json(output / "generation_config.json", {"eos_token_id": genai["eos_token_id"]})
    for name, change in (
        ("model", rotate_outside),
        ("model_fused", lambda model: None),
        ("model_fp16", halve),
        ("model_plain", concatenate),
    ):
        model = onnx.load(str(source / "model.onnx"))
        change(model)
        model.graph.input.append(POSITIONS)
        save(model, output / "onnx" / f"{name}.onnx")
    return output


def config_of(genai: dict[str, Any]) -> dict[str, Any]:
    decoder = genai["decoder"]
    same = ("head_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    sizes = {name: decoder[name] for name in same} | {"hidden_size": decoder["hidden_size"]}
    return {
        "_name_or_path": "someone/small-llama",
        "architectures": ["LlamaForCausalLM"],
        "model_type": genai["type"],
        "head_dim": sizes.pop("head_size"),
        "max_position_embeddings": genai["context_length"],
        "vocab_size": genai["vocab_size"],
        "transformers.js_config": {"use_external_data_format": True},
        **sizes,
    }


def attributes(node: NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def split_qkv(
    node: NodeProto, graph: GraphProto, head_size: int
) -> tuple[list[NodeProto], list[str]]:
    """The nodes that give queries, keys and values of their own, and the names of these."""
    given = attributes(node)
    width = given["kv_num_heads"] * head_size
    sizes = numpy_helper.from_array(
        np.array([given["num_heads"] * head_size, width, width], np.int64), f"{node.name}/sizes"
    )
    graph.initializer.append(sizes)
    parts = [f"{node.name}/{part}" for part in ("q", "k", "v")]
    return [helper.make_node("Split", [node.input[0], sizes.name], parts, axis=-1)], parts


def rotate_outside(model: ModelProto) -> None:
    """RotaryEmbedding nodes on queries and keys, fed with position_ids."""
    graph, nodes = model.graph, []
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            nodes.append(node)
            continue
        given = attributes(node)
        made, parts = split_qkv(node, graph, head_size_of(graph))
        for place, heads in ((0, given["num_heads"]), (1, given["kv_num_heads"])):
            turned = f"{parts[place]}/turned"
            made.append(
                helper.make_node(
                    "RotaryEmbedding",
                    [parts[place], "position_ids", "cos_cache", "sin_cache"],
                    [turned],
                    domain="com.microsoft",
                    num_heads=heads,
                    interleaved=given["rotary_interleaved"],
                )
            )
            parts[place] = turned
        del node.input[:]
        node.input.extend([*parts, *past_and_lengths(node, graph)])
        next(each for each in node.attribute if each.name == "do_rotary").i = 0
        nodes += [*made, node]
    replace_nodes(graph, nodes)


def past_and_lengths(node: NodeProto, graph: GraphProto) -> list[str]:
    layer = node.name.split("layers.")[1].split("/")[0]
    mask = "/model/attn_mask_reformat/attn_mask_subgraph"
    lengths = [f"{mask}/Sub/Cast/output_0", f"{mask}/Gather/Cast/output_0"]
    return [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", *lengths]


def concatenate(model: ModelProto) -> None:
    """As exporters did before the operator was known: present is past and new, concatenated."""
    graph, nodes = model.graph, []
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            nodes.append(node)
            continue
        made, (query, key, value) = split_qkv(node, graph, head_size_of(graph))
        past_key, past_value = past_and_lengths(node, graph)[:2]
        made += [
            helper.make_node("Concat", [past_key, key], [node.output[1]], axis=2),
            helper.make_node("Concat", [past_value, value], [node.output[2]], axis=2),
            helper.make_node("MatMul", [query, node.output[1]], [f"{node.name}/scores"]),
            helper.make_node("Softmax", [f"{node.name}/scores"], [f"{node.name}/weights"]),
            helper.make_node("MatMul", [f"{node.name}/weights", node.output[2]], [node.output[0]]),
        ]
        nodes += made
    replace_nodes(graph, nodes)


def halve(model: ModelProto) -> None:
    """`model` in half precision: weights, caches and logits."""
    rotate_outside(model)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]


def head_size_of(graph: GraphProto) -> int:
    cache = next(tensor for tensor in graph.initializer if tensor.name == "cos_cache")
    return int(cache.dims[1]) * 2


def replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def save(model: ModelProto, file: Path) -> None:
    onnx.save_model(
        model,
        str(file),
        save_as_external_data=True,
        location=f"{file.name}_data",
        size_threshold=128,  # onnxruntime reads sizes of shapes while it loads, and only here
    )


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    print(export(Path(sys.argv[1]), Path(sys.argv[2])))
