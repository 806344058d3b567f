"""The models of the parity test: for each family its configuration, tiny.

What differs is what a family is about: heads, rope, windows, norms, ties. A window of 16 positions
and an original context of 32 are crossed by prompts of up to 40 tokens with 24 new ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

CONTEXT = 128
WINDOW = 16
ORIGINAL = 32  # the context before long rope or Llama 3's scaling


@dataclass(frozen=True)
class Family:
    """A configuration class, what it is given beyond the common sizes, and more than fp32.

    `builds` are further exports of the same weights: `int4` and `int8` for the CPU, `fp16` for
    CUDA, and `fp16-graph`, of which the graph alone is kept: the CPU provider cannot run it.
    """

    config: type[PreTrainedConfig]
    settings: dict[str, object] = field(default_factory=dict)
    builds: tuple[str, ...] = ()


def rope(theta: float = 10_000.0, **more: object) -> dict[str, object]:
    return {"rope_theta": theta, "rope_type": "default"} | more


def factors(count: int, last: float) -> list[float]:
    """From 1 to `last`, one for each pair of rotated dimensions."""
    return [1 + (last - 1) * at / (count - 1) for at in range(count)]


def long_rope(rotated: int, **more: object) -> dict[str, object]:
    """Short and long factors for `rotated` of a head's dimensions (Phi's heads share the size)."""
    return {
        "hidden_size": 64,
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": rope(
            rope_type="longrope",
            type="longrope",
            short_factor=factors(rotated // 2, 1.5),
            long_factor=factors(rotated // 2, 9.0),
            **more,
        ),
    }


# Several tokens end a text: the markers behind the bytes, of which the last is the tokenizer's own.
ENDS = (294, 295)
LLAMA3_ROPE = rope(
    500_000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL,
)
# Embeddings are scaled by the root of the size, which the builder rounds: 64 has a whole one.
GEMMA1 = {"hidden_size": 64, "tie_word_embeddings": True}
GEMMA = GEMMA1 | {"query_pre_attn_scalar": 24, "sliding_window": WINDOW}
GEMMA3_ROPE = {
    "sliding_attention": rope(10_000.0),
    "full_attention": rope(1_000_000.0, rope_type="linear", factor=8.0),
}

FAMILIES = {
    "llama": Family(LlamaConfig),
    "llama2": Family(LlamaConfig, {"num_key_value_heads": 4}),
    "llama3": Family(
        LlamaConfig,
        {"tie_word_embeddings": True, "eos_token_id": list(ENDS), "rope_parameters": LLAMA3_ROPE},
        builds=("int4", "int8"),
    ),
    "qwen2": Family(
        Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": rope(1_000_000.0)}
    ),
    "qwen3": Family(
        Qwen3Config,
        {"head_dim": 32, "rope_parameters": rope(1_000_000.0)},
        builds=("int4", "int8", "fp16-graph"),
    ),
    "mistral": Family(MistralConfig, {"sliding_window": WINDOW}),
    "phi3": Family(Phi3Config, {"num_key_value_heads": 4, "sliding_window": 24} | long_rope(16)),
    "phi4": Family(
        Phi3Config,
        {"tie_word_embeddings": True, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"head_dim": 32}
        | long_rope(16, partial_rotary_factor=0.5),
        builds=("fp16",),
    ),
    "gemma": Family(GemmaConfig, GEMMA1 | {"num_key_value_heads": 1}),
    "gemma2": Family(
        Gemma2Config,
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0},
        builds=("int4", "int8", "fp16"),
    ),
    "gemma3": Family(
        Gemma3TextConfig,
        GEMMA
        | {"num_hidden_layers": 3, "sliding_window_pattern": 3}
        | {"rope_parameters": GEMMA3_ROPE},
        builds=("fp16-graph",),
    ),
    "smollm3": Family(
        SmolLM3Config,
        {
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "rope_parameters": rope(5_000_000.0),
        },
    ),
}


def configure(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": rope(),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return family.config(**common | family.settings)
