"""What can be imported is decided by its files, before anything is built, with the reason."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from tests.workers.builder_stand_in import CONFIG, source, weights, write
from workers.building.options import builder_options
from workers.building.sources import DEVICES, FAMILIES, PRECISIONS, Source, check_kernels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return source(tmp_path / "llama")


def refusal(folder: Path) -> str:
    with pytest.raises(SpecError) as error:
        Source("llama", folder, local=True).check()
    return str(error.value)


def with_config(folder: Path, **changes: Any) -> Path:
    write(folder / "config.json", CONFIG | changes)
    return folder


def test_every_family_is_taken(folder: Path) -> None:
    for architecture in FAMILIES:
        Source("m", with_config(folder, architectures=[architecture]), local=True).check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "one of LlamaForCausalLM (Llama 2 and 3"),
        ({"architectures": None}, "got ''"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "mixture of experts"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts (Qwen3MoeForCausalLM)"),
        ({"num_experts": 64}, "mixture of experts (num_experts: 64)"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"a": 1}},
            "multimodal model (vision_config)",
        ),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "got 'linear_attention'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "got 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "default or llama3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights quantized by gptq"),
    ],
)
def test_what_cannot_run_is_refused_with_the_key(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    told = refusal(with_config(folder, **changes))
    assert told.startswith("llama: config.json") and reason in told


def test_one_expert_is_a_dense_model(folder: Path) -> None:
    Source("m", with_config(folder, num_local_experts=1, num_experts=None), local=True).check()


def test_each_kind_of_layer_may_have_a_rotation_of_its_own(folder: Path) -> None:
    kinds = {"full_attention": {"rope_type": "linear"}, "sliding_attention": {}}
    gemma = {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": kinds}
    Source("m", with_config(folder, **gemma), local=True).check()
    kinds["full_attention"]["rope_type"] = "dynamic"
    assert "got 'dynamic'" in refusal(with_config(folder, **gemma))


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"expected {len(whole)} bytes, got {len(whole) - 1}: truncated" in refusal(folder)
    for size in (0, 4, 20):
        file.write_bytes(whole[:size])
        assert "expected a safetensors file" in refusal(folder)


def test_weights_that_were_not_fetched_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.example/spec/v1\noid 1\n")
    assert "git lfs pull" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "expected weights" in refusal(folder)


def test_every_part_of_the_index_must_be_there(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    parts = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    write(folder / "model.safetensors.index.json", {"weight_map": parts})
    weights(folder / parts["a"], elements=3)
    assert "the weights file model-2-of-2.safetensors" in refusal(folder)
    weights(folder / parts["b"], elements=4)
    whole = Source("m", folder, local=True)
    whole.check()
    assert whole.weights() == 7


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "expected a tokenizer" in refusal(folder)


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "expected a JSON object" in refusal(folder)


def test_precisions_without_kernels_are_refused_with_those_that_have_some() -> None:
    taken = set()
    for precision in PRECISIONS:
        for device in DEVICES:
            try:
                check_kernels(precision, device)
                taken.add((precision, device))
            except SpecError as error:
                assert precision in str(error) and "int4" in str(error)
    on_cuda = {(each, "cuda") for each in ("fp16", "bf16", "int8", "int4")}
    assert taken == on_cuda | {(each, "cpu") for each in ("fp32", "int8", "w8a8", "int4")}
    for precision, device in (("q4", "cpu"), ("fp32", "tpu")):
        with pytest.raises(SpecError):
            check_kernels(precision, device)


def test_more_precision_needs_more_room(folder: Path) -> None:
    weights(folder / "model.safetensors", elements=1_000_000)
    source = Source("m", folder, local=True)
    by_way_of_fp32 = source.bytes_needed("w8a8")
    sizes = [source.bytes_needed(each) for each in PRECISIONS if each != "w8a8"]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4_000_000
    assert by_way_of_fp32 > sizes[0]


def test_options_are_those_of_the_device_and_an_extra_goes_before_them() -> None:
    plain = builder_options("fp32", "cpu", "LlamaForCausalLM", ())
    assert plain == {"windowed_kv_cache": "false"}
    int4 = builder_options("int4", "cpu", "LlamaForCausalLM", ("block_size=64", "fuse_qkv = false"))
    assert (int4["block_size"], int4["accuracy_level"], int4["fuse_qkv"]) == ("64", "4", "false")
    gemma = builder_options("int4", "cuda", "Gemma2ForCausalLM", ())
    assert gemma["use_cuda_bf16"] == "true"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("block_size", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("use_paged_attention=true", "PagedAttention"),
        ("hf_token=secret", "set HF_TOKEN"),
        ("hf_remote=true", "runs code"),
        ("dflash2_path=x", "speculation"),
        ("windowed_kv_cache=true", "every position"),
    ],
)
def test_extras_that_the_engine_could_not_run_are_refused(extra: str, reason: str) -> None:
    with pytest.raises(SpecError) as error:
        builder_options("int4", "cpu", "LlamaForCausalLM", (extra,))
    assert reason in str(error.value) and "secret" not in str(error.value)
