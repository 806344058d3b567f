"""The builder's options: good ones for each precision and device, and those that are refused.

Knows the words of onnxruntime-genai's model builder and what our engine can run of what they make.
"""

from collections.abc import Mapping, Sequence

from orchestrator.errors import SpecError

# By measurement on the CPU (docs/models.md): blocks of 64 and 128 gained
# little for one row and lost at 16; level 4 computes in int8, which every SIMD unit has.
_QUANTIZED = {
    "cpu": {"block_size": "32", "accuracy_level": "4", "is_symmetric": "true"},
    "cuda": {"block_size": "32", "accuracy_level": "0", "is_symmetric": "true"},
}
_RANGE_OF_BF16 = {"Gemma2ForCausalLM", "Gemma3ForCausalLM"}  # their activations overflow fp16

_OTHER_GRAPH = "makes a graph that the engine does not run"
_REFUSED: Mapping[str, str] = {
    "exclude_embeds": f"{_OTHER_GRAPH}: it begins with embeddings",
    "exclude_lm_head": f"{_OTHER_GRAPH}: it ends without logits",
    "include_hidden_states": f"{_OTHER_GRAPH}: it has outputs beside the logits",
    "aux_hidden_state_layers": f"{_OTHER_GRAPH}: it has outputs beside the logits",
    "prune_lm_head": "is not needed: the engine computes one row of logits by itself",
    "use_paged_attention": f"{_OTHER_GRAPH}: PagedAttention",
    "windowed_kv_cache": "is false here: the engine keeps every position of a row",
    "kv_cache_quant_scheme": f"{_OTHER_GRAPH}: it has a quantized KV cache",
    "kv_cache_rotation": f"{_OTHER_GRAPH}: it has a rotated KV cache",
    "use_qdq": f"{_OTHER_GRAPH}: QuantizeLinear in place of MatMulNBits",
    "config_only": "makes no graph",
    "filename": "is model.onnx here",
    "adapter_path": "needs a package that the environment has not: merge the adapter first",
    "hf_remote": "runs code that came with the model; families that need it are not supported",
    "hf_token": "would show your token to every user of this machine: set HF_TOKEN",
    "quant_config": "is not taken: name the options one by one",
}
_REFUSED_BEGINNINGS = ("dflash2", "dspark", "mtp", "max_draft", "paged_", "state_", "exclude_mtp")


def builder_options(
    precision: str, device: str, architecture: str, extras: Sequence[str]
) -> dict[str, str]:
    """What is passed to the builder as `key=value`; an extra goes before our own.

    Raises SpecError for an extra that is no `key=value`, or that the engine could not run.
    """
    options = {"windowed_kv_cache": "false"}
    if precision in ("int4", "int8"):
        options |= _QUANTIZED[device]
    if precision == "int4" and device == "cuda" and architecture in _RANGE_OF_BF16:
        options["use_cuda_bf16"] = "true"
    for extra in extras:
        key, equals, value = (part.strip() for part in extra.partition("="))
        if not (key and equals and value):
            raise SpecError("--extra", "KEY=VALUE", repr(extra))
        if key in _REFUSED or key.startswith(_REFUSED_BEGINNINGS):
            why = _REFUSED.get(key, f"{_OTHER_GRAPH}: speculation and paging are the engine's own")
            raise SpecError(f"--extra {key}", "an option of a plain decoder", f"one that {why}")
        options[key] = value
    return options
