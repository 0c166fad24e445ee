"""What a model's files say against training it is said before weights are read, with the option's name."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model.checks import (
    adapter_targets,
    convert_peft_config_for_transformers,
    require_decoder,
    require_trainable,
)
from grpo_dist.model.config_files import check_model_config, end_token_ids, load_model_config, load_tokenizer
from grpo_dist.model.files import UnfitModel, require_weights
from grpo_dist.model.load import adapted_layers, load_causal_lm, make_policy, trainable, try_blank
from grpo_dist.model.toy import toy_path

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
MUSICGEN = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"},
            "decoder": {"model_type": "musicgen_decoder"}}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def config(kind: str, **options: Any) -> Any:
    """A small config of a model type."""
    if kind == "gemma3":
        return AutoConfig.for_model(kind, text_config=SIZES, vision_config=VISION, mm_tokens_per_image=4, **options)
    return AutoConfig.for_model(kind, **{**SIZES, **options})


def blank(kind: str, **options: Any) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(kind, **options))


def test_all_linear_layers_of_a_plain_model() -> None:
    assert adapter_targets(blank("qwen2", tie_word_embeddings=True), "all-linear") == ("all-linear", None)
    assert adapter_targets(blank("gpt2", n_embd=32, n_layer=2, n_head=4), ["c_attn"]) == (["c_attn"], None)
    assert adapter_targets(blank("qwen2"), r".*\.1\..*q_.*") == (["model.layers.1.self_attn.q_proj"], None)
    assert len(adapted_layers(make_policy(blank("qwen2"), ModelConfig(), LoraConfig(target_modules=".*")))) == 15
    assert adapter_targets(blank("qwen2", tie_word_embeddings=False), ["lm_head"]) == (["lm_head"], None)


def test_experts_in_one_tensor_are_left_out() -> None:
    policy = make_policy(blank("qwen3_moe", **MOE), ModelConfig(), LoraConfig())
    assert {name.rpartition(".")[2] for name in adapted_layers(policy)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    left_out = try_blank(ModelConfig(), LoraConfig(), config("qwen3_moe", **MOE), None)
    assert left_out == "down_proj, gate_up_proj (experts in one tensor)"


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "jamba"])
def test_layers_that_mambas_kernels_take_apart_are_left_out(kind: str) -> None:
    """PEFT refuses them for some types; on a GPU an adapter there would be in the rollout and not in the update."""
    sizes = {"num_heads": 8, "head_dim": 8} if kind == "mamba2" else {}
    model = blank(kind, **sizes)
    names = adapted_layers(make_policy(model, ModelConfig(), LoraConfig()))
    assert {name.rpartition(".")[2] for name in names if ".mixer." in name or ".mamba." in name} == {"in_proj"}
    with pytest.raises(UnfitModel, match="'out_proj' cannot have adapters: Mamba's kernels take its weights"):
        adapter_targets(model, ["out_proj"])


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 14), (["q_proj", "k_proj"], 4)])
def test_towers_beside_the_language_model_are_left_out(targets: str | list[str], count: int) -> None:
    policy = make_policy(blank("gemma3"), ModelConfig(), LoraConfig(target_modules=targets))
    names = list(adapted_layers(policy))
    assert len(names) == count and all("language_model" in name for name in names)
    with pytest.raises(UnfitModel, match="'out_proj' cannot have adapters: outside the language model"):
        adapter_targets(blank("gemma3"), ["q_proj", "out_proj"])


def test_towers_beside_the_language_model_are_not_trained_at_all() -> None:
    trained = trainable(make_policy(blank("gemma3"), ModelConfig(), None))
    assert trained and not [name for name in trained if "vision" in name or "projector" in name]
    assert len(trainable(make_policy(blank("qwen2"), ModelConfig(), None))) > 20


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_prj"], r"'v_prj' is not a layer of Qwen2ForCausalLM; did you mean 'v_proj'\?"),
        ([], "it names no layer"),
        ("q_proj", r"a string is a pattern for full names, and matches none; write \[q_proj\]"),
        (["nothing"], r"'nothing' is not a layer of Qwen2ForCausalLM\. Expected `all-linear`, or names among down"),
        (["lm_head"], "'lm_head' cannot have adapters: its weights are tied"),
        (["q_proj", "embed_tokens"], "'embed_tokens' is not a linear layer"),
    ],
)
def test_names_that_match_nothing_are_refused(targets: str | list[str], message: str) -> None:
    with pytest.raises(UnfitModel, match=rf"lora\.target_modules: .* given, but {message}"):
        try_blank(ModelConfig(), LoraConfig(target_modules=targets), config("qwen2", tie_word_embeddings=True), None)


def test_names_of_experts_in_one_tensor_are_refused() -> None:
    with pytest.raises(UnfitModel, match="'gate_proj' is part of experts in one tensor"):
        try_blank(ModelConfig(), LoraConfig(target_modules=["q_proj", "gate_proj"]), config("qwen3_moe", **MOE), None)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: config("llama", quantization_config={"quant_method": "gptq"}), r"quantised checkpoint \(gptq\)"),
        (lambda: AutoConfig.for_model("gemma3", text_config=SIZES | {"quantization_config": {"quant_method": "awq"}},
                                      vision_config=VISION), r"quantised checkpoint \(awq\)"),
        (lambda: AutoConfig.for_model("t5"), "an encoder-decoder of the type t5 given"),
        (lambda: AutoConfig.for_model("vit"), "a model of the type vit given, expected a causal language model"),
        (lambda: AutoConfig.for_model("bart"), "an encoder-decoder of the type bart given"),
        (lambda: AutoConfig.for_model("rwkv"), "a model of the type rwkv given, which cannot be trained here"),
        pytest.param(lambda: AutoConfig.for_model("gemma4_unified_assistant"), "needs that model's states",
                     marks=pytest.mark.skipif("gemma4_unified_assistant" not in CONFIG_MAPPING, reason="release")),
        (lambda: config("llama", architectures=["LlamaForSequenceClassification"]), "no head that predicts tokens"),
        (lambda: config("llama", architectures=["LlamaModel"]), "a checkpoint of LlamaModel given .* has no head"),
        (lambda: AutoConfig.for_model("musicgen", **MUSICGEN), "has several language models"),
        (lambda: config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
         r"expected at most 64 .*dynamic"),
        (lambda: config("gemma3_text", rope_parameters={
            "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}), r"expected at most 64 .*dynamic"),
        (lambda: config("gemma2", use_bidirectional_attention=True), "tokens see later ones .*bidirectional_attention"),
        (lambda: config("llama", is_causal=False), r"tokens see later ones \(is_causal: False"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_trained_are_refused(made: Any, message: str) -> None:
    with pytest.raises(UnfitModel, match=message):
        require_trainable(made(), 65)
    require_trainable(config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), 64)


def test_padding_beyond_the_embeddings_is_named() -> None:
    with pytest.raises(UnfitModel, match=r"pad_token_id 300 given in config\.json, expected .* \(0 to 259\)"):
        check_model_config(config("llama", pad_token_id=300), make_tokenizer(), 16)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "config.json").write_bytes((toy_path() / "config.json").read_bytes())
    for load in (load_tokenizer, load_model_config):
        with pytest.raises(UnfitModel, match=r"model\.name: .* is a PEFT adapter .*merge_and_unload"):
            load(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {}, "of the type bert given that is an encoder"),
        pytest.param("cwm", {"bos_token_id": None}, "StrictDataclassFieldValidationError: .*bos_token_id",
                     marks=pytest.mark.skipif(not is_dataclass(PreTrainedConfig), reason="configs without types")),
    ],
)  # fmt: skip
def test_configs_of_no_decoder_are_refused(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | SIZES | options))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UnfitModel, match=message):
        try_blank(ModelConfig(name=str(tmp_path)), None, load_model_config(ModelConfig(name=str(tmp_path))), None)


def test_a_decoder_needs_no_is_decoder() -> None:
    """BERT without it is an encoder, and nothing is said of the others."""
    with pytest.raises(UnfitModel, match="of the type bert given that is an encoder"):
        require_decoder(blank("bert"))
    require_decoder(blank("bert", is_decoder=True))
    require_decoder(blank("gpt_neox", is_decoder=False))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantised_weights_are_seen_without_a_word_in_the_config(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    """Loading would make plain numbers of them, without their scales."""
    AutoModelForCausalLM.from_config(config("qwen2")).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnfitModel, match=rf"has quantised weights \(model\.layers\.1\..*weight in {name}\)"):
        try_blank(ModelConfig(name=str(tmp_path)), None, load_model_config(ModelConfig(name=str(tmp_path))), None)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config("qwen2")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 24}))
    with pytest.raises(UnfitModel, match=r"has 6 weights of other shapes .*: \(32, 64\), expected \(32, 24\)"):
        load_causal_lm(ModelConfig(name=str(tmp_path)), torch.float32, None)


@pytest.mark.parametrize(
    ("weight", "is_of_a_layer"),
    [
        ("model.layers.0.self_attn.o_proj.bias", True),
        ("model.layers.1.self_attn.q_norm.weight", True),
        ("lm_head.bias", True),
        ("model.layers.0.self_attn.masked_bias", False),
        ("mtp.layers.0.self_attn.o_proj.weight", False),
        ("v_head.weight", False),
    ],
)
def test_weights_that_the_config_leaves_out_of_layers_are_named(
    weight: str, is_of_a_layer: bool, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(config("qwen2"))
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | {weight: torch.ones(32)})
    base = ModelConfig(name=str(tmp_path))
    if not is_of_a_layer:
        load_causal_lm(base, torch.float32, None)
        return
    with pytest.raises(
        UnfitModel, match=f"has 1 weights for which Qwen2.* has no place .*{weight}.*correct model_type"
    ):
        load_causal_lm(base, torch.float32, None)


def test_files_of_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config("qwen2")).save_pretrained(tmp_path, max_shard_size="20KB")
    parts = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(parts) > 2
    require_weights("mine", tmp_path)
    complete = (tmp_path / parts[1]).read_bytes()
    for text in (b"version https://git-lfs.github.com/spec/v1", complete[:-1]):
        (tmp_path / parts[1]).write_bytes(text)
        with pytest.raises(UnfitModel, match=rf"{parts[1]} is not a complete weight file .*git lfs pull"):
            require_weights("mine", tmp_path)
        with pytest.raises(UnfitModel, match="cannot be loaded"):
            load_causal_lm(ModelConfig(name=str(tmp_path)), torch.float32, None)
    (tmp_path / parts[1]).unlink()
    (tmp_path / "pytorch_model.bin").touch()  # of which transformers reads nothing beside these files
    with pytest.raises(UnfitModel, match=rf"'mine' lacks 1 of the {len(parts)} weight files .* \({parts[1]}\)"):
        require_weights("mine", tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UnfitModel, match=r"'mine' has no weights, expected model\.safetensors"):
        require_weights("mine", tmp_path)
    (tmp_path / "mine-q4.gguf").touch()
    with pytest.raises(UnfitModel, match=r"'mine' has no weights.* GGUF files are for inference alone"):
        require_weights("mine", tmp_path)


@pytest.mark.skipif(convert_peft_config_for_transformers is None, reason="this PEFT takes names as they are")
def test_names_that_peft_takes_for_experts_are_left_out() -> None:
    """It would put those adapters on the experts' tensors, for which nothing here is made."""
    sizes = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
             "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
    names = adapted_layers(make_policy(blank("dots1", **sizes), ModelConfig(), LoraConfig()))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UnfitModel, match="'up_proj' cannot have adapters: PEFT takes its name for the experts'"):
        adapter_targets(blank("dots1", **sizes), ["q_proj", "up_proj"])


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config("qwen2")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(UnfitModel, match="lacks 12 weights of Qwen2ForCausalLM"):
        load_causal_lm(ModelConfig(name=str(tmp_path)), torch.float32, None)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnfitModel, match="cannot be loaded"):
        load_causal_lm(ModelConfig(name=str(tmp_path)), torch.float32, None)


def test_end_tokens_of_a_model_with_several_configs(tmp_path: Path) -> None:
    given = config("gemma3")
    assert not hasattr(given, "eos_token_id")
    given.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = ModelConfig(name=str(tmp_path))
    assert end_token_ids(model, load_tokenizer(model)) == [2, 256]


def test_a_model_of_which_the_head_alone_can_have_an_adapter() -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes, tie_word_embeddings=False))
    with pytest.raises(UnfitModel, match=r"\(a layer with code of its own\): name the head, \[lm_head\], or"):
        adapter_targets(model, "all-linear")
    assert adapter_targets(model, ["lm_head"])[0] == ["lm_head"]
