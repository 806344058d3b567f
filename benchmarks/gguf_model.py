"""A Hugging Face folder's weights as GGUF, float32, q4_0 and q8_0, for llama.cpp.

Runs in the peers' environment. The same tensors under llama.cpp's names; without a vocabulary,
since the benchmarks give and take token ids. Knows the two families that make_model.py makes.
"""

import ctypes
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Weights = npt.NDArray[np.float32]

KINDS = {"q4_0": 2, "q8_0": 7}  # llama.h: LLAMA_FTYPE_MOSTLY_...
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Every tensor of `checkpoint` in float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(file, family)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is not a dict
            weights = tensors.get_tensor(name)
            if family == "llama" and ".q_proj." in name:
                weights = interleaved(weights, heads)
            if family == "llama" and ".k_proj." in name:
                weights = interleaved(weights, kv_heads)
            writer.add_tensor(name_of(name), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def name_of(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    inner, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{IN_LAYER[inner]}.{kind}"


def interleaved(weights: Weights, heads: int) -> Weights:
    """llama.cpp rotates neighbours in the Llama family, Hugging Face the halves of a head."""
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """llama.cpp's own q4_0 or q8_0, of every matrix: head and embeddings too."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = KINDS[kind], threads, True
    words = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*words, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantise {source}")
