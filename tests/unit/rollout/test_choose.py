"""Which decoder a model gets: by how it is built, by what is kept, by what other ranks found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_pairs import with_paged
from peft import LoraConfig, get_peft_model
from tiny_architectures import GPT, UNPACKABLE, alone, make_config, make_model, sharp
from torch import Tensor
from transformers.models.llama import modeling_llama

from grpo_dist.config.schema import RolloutConfig
from grpo_dist.model import attention
from grpo_dist.model.compiled.library import library
from grpo_dist.model.fused_modules import _instead
from grpo_dist.rollout import LoadedModel, NativeDecoder, PagedDecoder
from grpo_dist.rollout.choose import STEPS, UnfitEngine, _step_off, make_engine, own_step
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.llama import LlamaStep
from grpo_dist.rollout.native.relaid import CompactWeights
from grpo_dist.rollout.native.steps import module_step

BUILT_AS_LLAMA: dict[str, dict[str, Any]] = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Mistral": {},
    "Granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
                "attention_multiplier": 0.3},
    "Phi3": {}, "Gemma2": {"head_dim": 8}, "Gemma3Text": {"head_dim": 8},
}  # fmt: skip
BUILT_OTHERWISE: dict[str, dict[str, Any]] = {
    "GPT2": GPT, "Olmo2": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},  # without positions in one layer, which its modules do not show
}  # fmt: skip


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", BUILT_AS_LLAMA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_built_as_llama_are_known(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(make_config(name, BUILT_AS_LLAMA[name]), attention.NAME).to(dtype)
    assert own_step(model) == ("compiled", None)
    assert own_step(model, "operations") == ("operations", None)
    assert own_step(model, "modules") == ("modules", None)
    monkeypatch.setenv("CXX", "/no/compiler")
    library.cache_clear()
    try:
        assert own_step(model) == ("operations", "/no/compiler: No such file or directory")
    finally:
        library.cache_clear()


@pytest.mark.parametrize("name", BUILT_OTHERWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_built_otherwise_decode_through_their_modules(name: str, dtype: torch.dtype) -> None:
    assert own_step(make_model(make_config(name, BUILT_OTHERWISE[name]), attention.NAME).to(dtype))[0] == "modules"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": 36, "head_dim": 8}, "sizes 36, 48 and 8"), ({"intermediate_size": 20}, "sizes 32, 20 and 8"),
     ({"head_dim": 12}, "and 12"), ({"hidden_act": "gelu"}, "neither SiLU nor GELU")],
)  # fmt: skip
def test_what_the_kernel_does_not_compute_is_left_to_torch(change: dict[str, Any], message: str) -> None:
    model = make_model(make_config("Llama", change), attention.NAME)
    with pytest.raises(ValueError, match=message):
        KernelStep(model)
    assert own_step(model) == ("operations", None)


@pytest.mark.usefixtures("kernel")
def test_layers_that_differ_are_left_to_torch() -> None:
    for change in ("eps", "scale", "dtype", "width"):
        model = make_model(make_config("Llama", {}), attention.NAME)
        layer = model.base_model.layers[1]
        if change == "eps":
            layer.input_layernorm.variance_epsilon *= 10
        elif change == "scale":
            layer.self_attn.scaling *= 2
        elif change == "dtype":
            layer.mlp.bfloat16()
        else:
            layer.mlp = type(layer.mlp)(make_config("Llama", {"intermediate_size": 56}))
        with pytest.raises(ValueError, match=r"layers differ|expected torch\.float32"):
            KernelStep(model)


@pytest.mark.usefixtures("kernel")
def test_adapters_apart_are_no_reason_to_decode_through_the_modules() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).get_base_model()
    assert own_step(adapted)[0] == "compiled"


@pytest.mark.usefixtures("kernel")
def test_what_is_rounded_elsewhere_is_built_as_llama_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits: trained adapters, which this project adds before it rounds, and a GPU's kernel for rotations, which
    rounds once. In many layers both come to more than what is built otherwise."""
    model = sharp("Llama", {}, 4)
    plain = modeling_llama.apply_rotary_pos_emb

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turned = plain(*(x.float() for x in (query, key, cos, sin)))
        return tuple(x.to(query.dtype) for x in turned)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", _instead(plain, 4, lambda *_: True, rotate))
        assert 0.01 < _step_off("operations", model) < 0.1
        assert own_step(model) == ("compiled", None)
    adapters = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, adapters).get_base_model()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.mul_(0.01 if "lora_B" in name else 1)
    assert 0.01 < _step_off("operations", adapted) < 0.1
    assert own_step(adapted) == ("compiled", None)
    assert own_step(adapted, "operations") == ("operations", None)


@with_paged
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3Text"])
def test_the_paged_engine_is_taken_where_it_is_right(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    options = {"head_dim": 8} | UNPACKABLE.get(name, {})
    model, rollout = make_model(make_config(name, options), None), RolloutConfig(engine="paged")
    assert isinstance(make_engine(LoadedModel(model), "a window", [2], rollout, alone).decoder.decoder, PagedDecoder)
    assert "continuous batching (paged), in place of the one group at a time" in caplog.text


@with_paged
def test_what_one_rank_finds_holds_for_all() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    with pytest.raises(UnfitEngine, match="another rank's"):
        make_engine(LoadedModel(model), None, [2], RolloutConfig(engine="paged"),
                    lambda thing: [thing, thing if isinstance(thing, tuple) else "another rank's"])  # fmt: skip


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("kept", "others", "step_of", "told"),
    [(None, [], KernelStep, "decoding in C++"), 
     (None, ["operations"], LlamaStep, "which is slower than decoding in C++ (no g++)"),
     (None, ["operations", "modules"], module_step, "through the model's own modules"),
     ("operations", [], LlamaStep, "few operations"),
     ("compiled", ["operations"], LlamaStep, "decoding in few operations, and not decoding in C++ as before"),
     (["damaged"], [], KernelStep, "decoding in C++")],
)  # fmt: skip
def test_ranks_decode_alike_and_as_before(
    kept: Any, others: list[str], step_of: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    weights = LoadedModel(make_model(make_config("Llama", {}), attention.NAME))
    engine = make_engine(
        weights, None, [2], RolloutConfig(), lambda mine: [mine, *((name, "no g++") for name in others)], kept
    )
    assert engine.decoder.decoder.step_of is step_of
    assert told in caplog.text
    assert engine.decoding == {"engine": "native", "decoding": next(n for n, s in STEPS.items() if s is step_of)}


def test_few_sequences_read_compact_weights_where_decoding_is_in_cpp() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    for kept, is_compact in (None, True), ("operations", False):
        engine = make_engine(LoadedModel(model), None, [2], RolloutConfig(), alone, kept, compact=True)
        options = getattr(engine.decoder.decoder.step_of, "keywords", {})
        assert isinstance(options.get("compact"), CompactWeights) == is_compact and engine.compact


@with_paged
def test_soft_capped_scores_are_not_left_to_the_paged_engine() -> None:
    model = make_model(make_config("Gemma2", {"head_dim": 8}), None)
    with pytest.raises(UnfitEngine, match=r"rollout.engine: 'paged' given, .*soft-capped"):
        make_engine(LoadedModel(model), "a window", [2], RolloutConfig(engine="paged"), alone)


@with_paged
def test_the_paged_engine_is_refused_where_it_draws_something_else() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    plain = model.forward
    model.forward = lambda **inputs: plain(**inputs | {"position_ids": inputs["position_ids"] * ("layout" in inputs)})
    with pytest.raises(UnfitEngine, match=r"rollout.engine: 'paged' given, .*draws other completions"):
        make_engine(LoadedModel(model), None, [2], RolloutConfig(engine="paged"), alone)
    assert isinstance(make_engine(LoadedModel(model), None, [2], RolloutConfig(), alone).decoder.decoder, NativeDecoder)


@pytest.mark.usefixtures("kernel")
def test_positions_a_model_does_not_have_are_not_asked_of_it() -> None:
    model = make_model(make_config("Llama", {"max_position_embeddings": 9}), attention.NAME)
    asked: list[int] = []
    plain = model.base_model.rotary_emb.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        asked.append(int(position_ids.max()))
        return plain(x, position_ids)

    model.base_model.rotary_emb.forward = forward
    assert own_step(model) == ("compiled", None)
    assert max(asked) == 8
