"""onnxruntime-genai's model builder, with what version 0.18 gets wrong put right.

A script for an interpreter that has `onnxruntime_genai`: `python builder.py -i DIR -o DIR ...`,
with the arguments of `python -m onnxruntime_genai.models.builder`. Nothing of Penstock imports it,
and it imports nothing of Penstock. Two families do not build without it: Gemma 3, whose rope
settings transformers 5 keeps for each kind of layer, and SmolLM3, some of whose layers have no
positions (docs/decisions/0019-families.md).
"""

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

BUILDER = "onnxruntime_genai.models.builder"


def repair_gemma3(model: Any) -> None:
    """Let `Gemma3Model` read rope settings by the kind of layer, and scale the global alone."""
    read, make_cache = model.make_config_init, model.make_rotary_embedding_caches_from_scratch

    def make_config_init(self: Any, config: Any) -> None:
        read(self, config)
        settings = getattr(config, "rope_parameters", None) or {}
        if type(self) is model and "full_attention" in settings:
            config.rope_local_base_freq = settings["sliding_attention"]["rope_theta"]
            config.rope_theta = settings["full_attention"]["rope_theta"]
            config.rope_parameters = settings["full_attention"]

    def make_rotary_embedding_caches_from_scratch(self: Any) -> Any:
        if type(self) is model and hasattr(self, "cos_cache_local_name"):  # made after the global
            self.rope_attrs["rescale_factors"] = 1
        return make_cache(self)

    model.make_config_init = make_config_init
    model.make_rotary_embedding_caches_from_scratch = make_rotary_embedding_caches_from_scratch


def repair_smollm3(model: Any) -> None:
    """Let `SmolLM3Model` leave the rotation out where it otherwise asks for `position_ids`."""
    make = model.make_attention

    def make_attention(self: Any, layer_id: int, *rest: Any, **more: Any) -> None:
        rotated = self.attention_attrs["rope"]
        self.attention_attrs["rope"] = bool(self.no_rope_layers[layer_id])
        make(self, layer_id, *rest, **more)
        self.attention_attrs["rope"] = rotated

    model.make_attention = make_attention


def main() -> None:
    # Beside this script lie modules whose names the builder's environment may know otherwise.
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    importlib.import_module(BUILDER.rpartition(".")[0])  # puts `builders` on the path
    builders = importlib.import_module("builders")
    repair_gemma3(builders.Gemma3Model)
    repair_smollm3(builders.SmolLM3Model)
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
