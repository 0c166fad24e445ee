"""What is wrong with a checkpoint's weights is seen in the headers of its files, as a load of the weights would see it.

What cannot be compared safely is not spoken of.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import write_fp8, write_mxfp4
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from grpo_dist.config.schema import Config, LoraConfig, ModelConfig
from grpo_dist.model import headers
from grpo_dist.model.adapter import with_adapter
from grpo_dist.model.config_files import load_model_config
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.headers import compare_headers
from grpo_dist.model.load import load_causal_lm

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "gemma2": ("gemma2", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}
"""A head of its own and one that is not, renamed experts, experts that are joined."""


def write(path: Path, kind: str = "qwen2", **options: Any) -> None:
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)


def change_config(path: Path, **entries: Any) -> None:
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | entries))


def change_weights(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def compared(path: Path) -> str | None:
    model = ModelConfig(name=str(path))
    return compare_headers(model, load_model_config(model))


def loaded(path: Path) -> None:
    load_causal_lm(ModelConfig(name=str(path)), torch.float32, None)


def require_refused(path: Path, *parts: str) -> None:
    """Headers and weights are refused by the same words."""
    with pytest.raises(UnfitModel) as early:
        compared(path)
    with pytest.raises(UnfitModel) as late:
        loaded(path)
    assert str(early.value) == str(late.value)
    for part in parts:
        assert part in str(early.value)


@pytest.fixture(params=KINDS, name="whole")
def _whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A complete checkpoint and its config's name for the number of layers."""
    kind, options = KINDS[request.param]
    write(tmp_path, kind, **options)
    return tmp_path, "n_layer" if kind == "gpt2" else "num_hidden_layers"


def test_a_complete_checkpoint_is_not_spoken_of(whole: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    assert compared(whole[0]) is None
    assert capfd.readouterr().err == ""


def test_layers_that_the_config_does_not_count_are_named(
    whole: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    path, number = whole
    change_config(path, **{number: 1}, layer_types=None)
    with pytest.raises(UnfitModel):
        compared(path)
    assert "unexpected" not in capfd.readouterr().err.lower(), "transformers' report comes with the weights"
    layers = "transformer.h" if number == "n_layer" else "model.layers"
    require_refused(path, f"has 2 layers more than {loaded_class(path)} by its config.json ({layers}.1, {layers}.2)",
                    f"correct {number} there")  # fmt: skip


def loaded_class(path: Path) -> str:
    return str(json.loads((path / "config.json").read_text())["architectures"][0])


def test_layers_that_no_file_has_are_named(whole: tuple[Path, str]) -> None:
    path, number = whole
    change_config(path, **{number: 4}, layer_types=None)
    require_refused(path, "lacks ", "which would be random", ".3.")


def test_each_weight_of_a_layer_is_needed(whole: tuple[Path, str]) -> None:
    path, _ = whole
    weights = load_file(path / "model.safetensors")
    of_layer = [name for name in weights if ".1." in name and ".experts." not in name]
    assert len(of_layer) > 5
    for name in of_layer:
        rest = {each: weight for each, weight in weights.items() if each != name}
        save_file(rest, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UnfitModel, match=r"lacks 1 weights of .*\.1\."):
            compared(path)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_head_is_needed_where_it_is_not_tied(name: str, tmp_path: Path) -> None:
    write(tmp_path, tie_word_embeddings=False)
    change_weights(tmp_path, lambda weights: weights.pop(name))
    require_refused(tmp_path, f"lacks 1 weights of Qwen2ForCausalLM, which would be random ({name}")


def test_a_tied_head_that_is_stored_too_is_no_mistake(tmp_path: Path) -> None:
    write(tmp_path, tie_word_embeddings=True)
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.ones(260, 32)}))
    assert compared(tmp_path) is None
    loaded(tmp_path)


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("expert", [1, 3])
def test_an_expert_without_one_of_its_tensors_is_named(part: str, expert: int, tmp_path: Path) -> None:
    """transformers joins the experts, and has no name for one of them."""
    write(tmp_path, "qwen3_moe", **KINDS["qwen3_moe"][1])
    name = f"model.layers.1.mlp.experts.{expert}.{part}.weight"
    change_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(UnfitModel, match=rf"lacks 1 weights of its experts, which would be random \({name}"):
        compared(tmp_path)
    with pytest.raises(UnfitModel):
        loaded(tmp_path)


def test_fewer_experts_than_the_config_has_are_another_shape(tmp_path: Path) -> None:
    write(tmp_path, "qwen3_moe", **KINDS["qwen3_moe"][1])
    change_config(tmp_path, num_experts=6, num_local_experts=6)
    require_refused(tmp_path, "weights of other shapes than its config.json says")


def test_other_shapes_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    change_config(tmp_path, intermediate_size=24)
    require_refused(tmp_path, "has 9 weights of other shapes", "(32, 64), expected (32, 24)")


def test_a_sharded_checkpoint_and_a_weight_that_its_index_alone_names(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="30KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2 and compared(tmp_path) is None
    weights = load_file(parts[1])
    name = next(iter(weights))
    del weights[name]
    save_file(weights, parts[1], metadata={"format": "pt"})
    assert name in json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    require_refused(tmp_path, f"lacks 1 weights of LlamaForCausalLM, which would be random ({name}")
    parts[1].unlink()
    assert compared(tmp_path) is None, "`require_weights` names the file"


def test_a_checkpoint_of_the_model_without_its_head(tmp_path: Path) -> None:
    """Its names have no prefix, which transformers adds; as those of the first GPT-2."""
    config = AutoConfig.for_model("gpt2", **SIZES, **KINDS["gpt2"][1])
    AutoModel.from_config(config).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"h.0.attn.masked_bias": torch.ones(1)}))
    assert "h.0.ln_1.weight" in load_file(tmp_path / "model.safetensors") and compared(tmp_path) is None
    loaded(tmp_path)
    change_config(tmp_path, n_layer=2)
    require_refused(tmp_path, "has 1 layers more than GPT2LMHeadModel", "(transformer.h.2)", "correct n_layer")


@pytest.mark.parametrize(
    "name",
    ["mtp.layers.0.self_attn.o_proj.weight", "v_head.weight", "model.vision_tower.layers.0.mlp.up_proj.weight",
     "model.layers.3.eh_proj.weight"],
)  # fmt: skip
def test_weights_beside_the_language_model_are_left_out(name: str, tmp_path: Path) -> None:
    """Heads, towers, and layers that predict further tokens, for which transformers has lists in some types alone."""
    write(tmp_path)
    own = "model.layers.2.mlp.up_proj.weight"

    def add(weights: dict[str, Any]) -> None:
        weights[name] = torch.ones(32)
        if "eh_proj" in name:
            weights[own.replace(".2.", ".3.")] = weights[own].clone()

    change_weights(tmp_path, add)
    loaded(tmp_path)
    note = compared(tmp_path)
    assert note is not None and "are beside what Qwen2ForCausalLM computes" in note and name in note


def test_what_transformers_ignores_by_its_lists_is_not_spoken_of(tmp_path: Path) -> None:
    options = {"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1,
               "topk_group": 1, "num_experts_per_tok": 2}  # fmt: skip
    write(tmp_path, "glm4_moe", **options)
    change_weights(tmp_path, lambda weights: weights.update(
        {name.replace("layers.2.", "layers.46."): weights[name].clone() for name in [*weights] if "layers.2." in name}
    ))  # fmt: skip
    assert compared(tmp_path) is None
    loaded(tmp_path)


def test_pickled_weights_are_left_to_those_who_read_them(tmp_path: Path) -> None:
    write(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert compared(tmp_path) is None
    loaded(tmp_path)
    change_config(tmp_path, num_hidden_layers=2, layer_types=None)
    assert compared(tmp_path) is None
    with pytest.raises(UnfitModel, match=r"has 1 layers more than Qwen2ForCausalLM .*\(model\.layers\.2\)"):
        loaded(tmp_path)


@pytest.mark.parametrize("form", [write_fp8, write_mxfp4])
def test_dequantised_checkpoints_are_not_compared(form: Callable[[Path], Any], tmp_path: Path) -> None:
    form(tmp_path)
    assert compared(tmp_path) is None


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4", "8"])
def test_checkpoints_of_bitsandbytes_are_not_compared(bits: dict[str, bool], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**bits), device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "quantised")
    assert compared(tmp_path / "quantised") is None
    asked = ModelConfig(name=str(tmp_path / "plain"), quantization="nf4")
    assert compare_headers(asked, load_model_config(asked)) is None


def test_of_an_adapter_the_base_is_compared(tmp_path: Path) -> None:
    write(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, PeftLoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path / "adapter")
    config = with_adapter(Config(model=ModelConfig(name=str(tmp_path / "adapter")), lora=LoraConfig(r=2)))
    assert compare_headers(config.model, load_model_config(config.model)) is None
    change_config(tmp_path / "base", num_hidden_layers=2, layer_types=None)
    with pytest.raises(UnfitModel, match=r"has 1 layers more"):
        compare_headers(config.model, load_model_config(config.model))


def test_a_model_that_does_not_load_without_values_is_not_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, num_hidden_layers=2)
    change_config(tmp_path, num_hidden_layers=1, layer_types=None)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(headers, "_load_blank", refuse)
    assert compared(tmp_path) is None


def test_what_the_hub_s_cache_has_of_a_model_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    change_config(tmp_path, num_hidden_layers=2, layer_types=None)
    model_config = load_model_config(ModelConfig(name=str(tmp_path)))
    assert compare_headers(ModelConfig(name="some/model"), model_config) is None
    monkeypatch.setattr(headers, "stored_file", lambda _, name, __: tmp_path / name)
    with pytest.raises(UnfitModel, match=r"'some/model' has 1 layers more"):
        compare_headers(ModelConfig(name="some/model"), model_config)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert compare_headers(ModelConfig(name="some/model"), model_config) is None
