"""What a model can be imported from: its config.json and weights, judged before anything is built.

A refusal says what is in the way in the model's own words: the key of config.json, the file, the
precision that a device has no kernel for. Knows the families that the builder and our engine
both run; nothing of how a build is made (importing.py).
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import SpecError, WorkerError
from workers.folders.configs import read_object

# The families that are compared with transformers, by the architecture that config.json names.
FAMILIES: Mapping[str, str] = {
    "LlamaForCausalLM": "Llama 2 and 3, SmolLM 1 and 2",
    "SmolLM3ForCausalLM": "SmolLM 3",
    "Qwen2ForCausalLM": "Qwen 2 and 2.5",
    "Qwen3ForCausalLM": "Qwen 3",
    "MistralForCausalLM": "Mistral",
    "Phi3ForCausalLM": "Phi 3 and 4",
    "GemmaForCausalLM": "Gemma 1",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3 (text)",
}
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "w8a8", "int4")
DEVICES = ("cpu", "cuda")
_NO_KERNEL = {
    ("fp16", "cpu"): "the builder has no attention operator for fp16 on the CPU",
    ("bf16", "cpu"): "the CPU provider has no attention operator for bf16",
    ("w8a8", "cuda"): "the CUDA provider has no kernel for products of int8 by row and column",
    ("fp32", "cuda"): "the CUDA provider's attention operator computes in fp16 and bf16 only",
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_OTHER_SENSES = (
    "vision_config",
    "audio_config",
    "vision_tower",
    "mm_vision_tower",
    "speech_config",
)
_ROTATIONS = {"default", "linear"}  # that the builder computes for every family
_ROTATIONS_OF = {
    "LlamaForCausalLM": {"default", "llama3"},
    "SmolLM3ForCausalLM": {"default", "llama3"},
    "Phi3ForCausalLM": {"default", "longrope", "su"},
}
_BYTES_A_WEIGHT = {
    "fp32": 4.0,
    "fp16": 2.0,
    "bf16": 2.0,
    "int8": 1.25,
    "w8a8": 5.25,  # on its way; it is made from a build in fp32
    "int4": 0.75,
}
_SMALL_FILES = 64 * 2**20  # bytes: graphs, tokenizer, templates
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MOST_HEADER = 100_000_000  # bytes; what the safetensors library reads at most


@dataclass(frozen=True, slots=True)
class Source:
    """A Hugging Face folder on disk, or a name on a hub of which config.json alone is here."""

    name: str  # as it was given
    folder: Path  # where config.json is
    local: bool  # whether the weights are in `folder` too

    def check(self) -> None:
        """Raises SpecError with the reason why this cannot be imported."""
        _check_config(self.name, self.config())
        if self.local:
            _check_weights(self.folder)
            _check_tokenizer(self.folder)

    def config(self) -> dict[str, object]:
        """What config.json says; raises SpecError if it cannot be read."""
        file = self.folder / "config.json"
        try:
            return read_object(file)
        except WorkerError as error:
            raise SpecError(str(file), "a JSON object", error.message) from error

    @property
    def architecture(self) -> str:
        """The first that config.json names; "" if none."""
        return _architecture(self.config())

    def weights(self) -> int:
        """Numbers in the weights, by the safetensors headers; 0 where they are not on disk."""
        if not self.local:
            return 0
        return sum(map(_elements, sorted(self.folder.glob("*.safetensors"))))

    def bytes_needed(self, precision: str) -> int:
        """About what the result takes on the disk, a little more rather than less."""
        config = self.config()
        sizes = [config.get(key) for key in ("vocab_size", "hidden_size")]
        table = math.prod(size for size in sizes if isinstance(size, int))  # never quantized
        rest = max(self.weights() - table, 0)
        return int(rest * _BYTES_A_WEIGHT[precision] + table * 4) + _SMALL_FILES


def check_kernels(precision: str, device: str) -> None:
    """Raises SpecError where the device has no kernels for the precision, or one is unknown."""
    if precision not in PRECISIONS:
        raise SpecError("--precision", f"one of {', '.join(PRECISIONS)}", repr(precision))
    if device not in DEVICES:
        raise SpecError("--device", f"one of {', '.join(DEVICES)}", repr(device))
    if (precision, device) in _NO_KERNEL:
        fit = [each for each in PRECISIONS if (each, device) not in _NO_KERNEL]
        wrong = f"{precision}: {_NO_KERNEL[precision, device]}"
        raise SpecError(f"--precision on {device}", f"one of {', '.join(fit)}", wrong)


def _check_config(name: str, config: dict[str, object]) -> None:
    where = f"{name}: config.json"
    architecture = _architecture(config)
    _refuse_kinds(where, config, architecture)
    if architecture not in FAMILIES:
        families = "; ".join(f"{key} ({told})" for key, told in FAMILIES.items())
        raise SpecError(f"{where}: architectures", f"one of {families}", repr(architecture))
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method", "unknown")
        raise SpecError(where, "weights as they were trained", f"weights quantized by {method}")
    _check_rotation(where, config, architecture)


def _architecture(config: dict[str, object]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _refuse_kinds(where: str, config: dict[str, object], architecture: str) -> None:
    """Kinds of model that no precision or option could bring in."""
    experts = next((key for key in _EXPERTS if _above_one(config.get(key))), None)
    if experts or "moe" in architecture.lower():
        told = f"{experts}: {config[experts]}" if experts else architecture
        why = f"a mixture of experts ({told}), whose operator is not supported"
        raise SpecError(where, "a dense decoder", why)
    senses = next((key for key in _OTHER_SENSES if config.get(key)), None)
    if senses or "Vision" in architecture:
        why = f"a multimodal model ({senses or architecture})"
        raise SpecError(where, "a model of text alone", why)
    if config.get("is_encoder_decoder"):
        raise SpecError(where, "a decoder", "an encoder-decoder (is_encoder_decoder: true)")
    kinds = config.get("layer_types")
    other = set(kinds) - {"full_attention", "sliding_attention"} if isinstance(kinds, list) else ()
    if other:
        raise SpecError(f"{where}: layer_types", "attention in every layer", repr(sorted(other)[0]))


def _check_rotation(where: str, config: dict[str, object], architecture: str) -> None:
    """A rotation that the builder does not know for this family it leaves out, silently."""
    known = _ROTATIONS_OF.get(architecture, _ROTATIONS)
    for key, kind, _ in rotations(config):
        if kind not in known:
            one_of = " or ".join(sorted(known))
            raise SpecError(f"{where}: {key}.rope_type", one_of, repr(kind))


def rotations(
    config: Mapping[str, object],
) -> Iterator[tuple[str, object, Mapping[str, object]]]:
    """Each rotation that config.json names a kind of: its key, the kind, all that is said of it."""
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if not isinstance(scaling, dict):
            continue
        for each in (scaling, *scaling.values()):  # one for each kind of layer, in some
            kind = each.get("rope_type", each.get("type")) if isinstance(each, dict) else None
            if kind is not None:
                yield key, kind, each


def _above_one(value: object) -> bool:
    return isinstance(value, int) and value > 1


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = read_object(index).get("weight_map")
        names = sorted({str(n) for n in parts.values()}) if isinstance(parts, dict) else []
    else:
        names = [file.name for file in sorted(folder.glob("*.safetensors"))]
    if not names:
        raise SpecError(str(folder), "weights: model.safetensors, or its index", "none of them")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SpecError(str(folder), f"the weights file {missing[0]}", "none of that name")
    for name in names:
        _elements(folder / name)


def _elements(file: Path) -> int:
    """Numbers in a safetensors file; SpecError if it is none, or not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        begin = stream.read(8)
        if begin == b"version ":
            raise SpecError(str(file), "weights", "a Git LFS pointer: get them with `git lfs pull`")
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if not 2 <= length <= min(size, _MOST_HEADER):
            raise SpecError(str(file), "a safetensors file", f"{size} bytes that are none")
        try:
            tensors = json.loads(stream.read(length))
            ends = [each["data_offsets"][1] for key, each in tensors.items() if key[:2] != "__"]
            counts = [math.prod(each["shape"]) for key, each in tensors.items() if key[:2] != "__"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise SpecError(
                str(file), "a safetensors file", f"a header that is none: {error}"
            ) from error
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise SpecError(str(file), f"{whole} bytes", f"{size}: truncated, copy it again")
    return sum(counts)


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise SpecError(
            str(folder), f"a tokenizer: one of {', '.join(_TOKENIZERS)}", "none of them"
        )
