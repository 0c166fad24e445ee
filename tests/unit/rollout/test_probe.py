"""What cannot be packed is named, never silently accepted; and the plain route is right for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from small_models import batch_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama import modeling_llama

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.config.schema import RolloutConfig
from grpo_dist.model import attention
from grpo_dist.model.config_files import short_window
from grpo_dist.model.fixed_row import fixed_logits
from grpo_dist.model.fused_modules import _instead
from grpo_dist.model.load import packing_obstacle
from grpo_dist.model.packing import make_pack, plan
from grpo_dist.model.policy import Policy, PolicyOptions
from grpo_dist.rollout import (
    LoadedModel,
    NativeDecoder,
    PagedDecoder,
    Request,
    RowDecoder,
    Sampling,
    decode_all,
    paged_obstacle,
    probe,
)
from grpo_dist.rollout.choose import STEPS, UnfitEngine, _step_off, make_engine, own_step
from grpo_dist.rollout.native.compiled import library
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.llama import LlamaStep
from grpo_dist.rollout.native.steps import module_step
from grpo_dist.rollout.own_attention import settle_attention
from grpo_dist.rollout.probe import bounds_leak, packing_leak
from grpo_dist.types import Prompt

LONGEST = 64
TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "rotary_dim": 4}

PACKABLE: dict[str, dict[str, Any]] = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Gemma": {"head_dim": 8},
    "Mistral": {"sliding_window": LONGEST},
    "Gemma3Text": {"head_dim": 8, "sliding_window": LONGEST}, "GPT2": GPT,
    "Gemma2": {"head_dim": 8, "sliding_window": LONGEST},
}  # fmt: skip
UNPACKABLE: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 4},
    "Mamba2": {"head_dim": 16, "num_heads": 4, "state_size": 4, "n_groups": 1},
    "Bamba": {"attn_layer_indices": [1], **MAMBA},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, **MAMBA, **EXPERTS},
    "FalconH1": {"mamba_d_ssm": 64, **MAMBA},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 200},
    "Llama4Text": {"head_dim": 8, "intermediate_size_mlp": 32, **EXPERTS},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "GPTJ": GPT,
    "Falcon": {"alibi": True},
}  # fmt: skip


def make_config(name: str, options: dict[str, Any]) -> PretrainedConfig:
    """A tiny config of an architecture."""
    return getattr(transformers, f"{name}Config")(**{**TINY, **options})


def make_model(config: PretrainedConfig, implementation: str | None) -> nn.Module:
    """A random model with weights large enough for every token to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", PACKABLE)
def test_plain_decoders_are_packed(name: str) -> None:
    if name == "GPT2" and Version(transformers.__version__) < Version("5.3"):
        pytest.skip("before transformers 5.3 its model hands no layout on: one completion to a row")
    config = make_config(name, PACKABLE[name])
    assert packing_obstacle(config, LONGEST) is None
    assert packing_leak(make_model(config, attention.NAME)) is None


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


with_paged = pytest.mark.skipif(paged_obstacle() is not None, reason=str(paged_obstacle()))


def alone(thing: Any) -> list[Any]:
    """What all ranks say, where there is one."""
    return [thing]


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


def test_few_sequences_read_weights_in_bfloat16_where_decoding_is_in_cpp() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    for kept, options in (None, {"halves": True}), ("operations", {}):
        engine = make_engine(LoadedModel(model), None, [2], RolloutConfig(), alone, kept, halves=True)
        assert getattr(engine.decoder.decoder.step_of, "keywords", {}) == options and engine.halves


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


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_cannot_be_packed_is_named(name: str) -> None:
    """By its config or, once loaded as a run loads it, by its outputs; loading itself must not fail."""
    config = make_config(name, UNPACKABLE[name])
    obstacle = packing_obstacle(config, LONGEST)
    if obstacle is None:
        model = make_model(config, attention.NAME)
        if name == "GPTJ" and model._supports_attention_backend:
            pytest.skip("in this release its code takes another attention")
        obstacle = packing_leak(model)
    assert obstacle


@pytest.mark.parametrize(("name", "words"), [("Lfm2", "conv")])
def test_the_obstacle_says_what_it_is(name: str, words: str) -> None:
    assert words in str(packing_obstacle(make_config(name, UNPACKABLE[name]), LONGEST))


def test_a_window_that_no_layer_uses_is_none() -> None:
    config = make_config("Qwen2", {"use_sliding_window": False, "sliding_window": 8})
    assert packing_obstacle(config, LONGEST) is None and short_window(config, LONGEST) is None


WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 6}, "Phi3": {"sliding_window": 6}, "Qwen3": {
        "head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
    },
    "Gemma3Text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma2": {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "GptOss": {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteSWA": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
if not hasattr(transformers, "GraniteSWAConfig"):  # an older release
    del WINDOWED["GraniteSWA"]


@pytest.mark.parametrize("name", WINDOWED)
def test_layers_with_a_short_window_are_packed(name: str) -> None:
    config = make_config(name, WINDOWED[name])
    assert packing_obstacle(config, LONGEST) is None and short_window(config, LONGEST) == 6
    assert short_window(config, 6) is None
    model = make_model(config, attention.NAME)
    assert bounds_leak(model) is None
    assert model.config.sliding_window == 6 and model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("name", WINDOWED)
def test_rollouts_in_short_windows_are_those_of_the_models_own_attention(name: str) -> None:
    config = make_config(name, WINDOWED[name])
    prompts = [[(5 * k + n) % 57 + 3 for k in range(length)] for n, length in enumerate((3, 15))]
    requests = [Request(slot, sample, prompts[slot], stream_key(0, slot, sample))
                for slot in range(2) for sample in range(3)]  # fmt: skip
    expected = decode_all(RowDecoder([2, 9], 14), make_model(config, "eager"), requests)
    engine = make_engine(LoadedModel(make_model(config, attention.NAME)), None, [2, 9],
                         RolloutConfig(max_completion_length=14), alone)  # fmt: skip
    assert engine.decoding["decoding"] == ("operations" if name == "GptOss" else "compiled")
    for decoder in (engine.decoder, *(NativeDecoder([2, 9], 14, 1 << 20, step_of=step_of, copied_prompt=0)
                                      for step_of in (LlamaStep, module_step))):  # fmt: skip
        drawn = decode_all(decoder, make_model(config, attention.NAME), requests)
        assert [each.ids for each in drawn] == [each.ids for each in expected]
        assert all(abs(p - q) < 1e-4 for a, b in zip(drawn, expected, strict=True)
                   for p, q in zip(a.logprobs, b.logprobs, strict=True))  # fmt: skip


@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_a_fixed_row_is_computed_in_windows_and_soft_caps(name: str) -> None:
    config = make_config(name, WINDOWED[name])
    packed, own = (fixed_logits(make_model(config, implementation)) for implementation in (attention.NAME, "eager"))
    assert torch.allclose(packed, own, atol=1e-4)


@contextmanager
def without(option: str) -> Iterator[None]:
    """A layout that leaves out an option of attention."""
    plain = attention.RowLayout.attend
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention.RowLayout, "attend", lambda self, *rows_and_options: plain(
            self, *rows_and_options[:-1], replace(rows_and_options[-1], **{option: None})))  # fmt: skip
        yield


def test_soft_caps_that_are_left_out_are_caught() -> None:
    model = make_model(make_config("Gemma2", WINDOWED["Gemma2"]), attention.NAME)
    with without("softcap"):
        assert "are off by" in str(bounds_leak(model))


def test_sinks_that_are_left_out_are_caught() -> None:
    model = make_model(make_config("GptOss", WINDOWED["GptOss"]), attention.NAME)
    with without("sinks"):
        assert "are off by" in str(bounds_leak(model))
        assert "are off by" in str(settle_attention([model], attention.NAME, None, False, alone))


def test_rounding_in_many_layers_is_no_fault_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model's own attention rounds elsewhere, as a GPU's does: in 16 bits unlikely tokens then change by more
    than a nat."""
    monkeypatch.setattr(probe, "soft_cap", lambda _: 1.0)  # its own attention is then the eager one
    model = sharp("Mistral", WINDOWED["Mistral"], 8)
    assert bounds_leak(model) is None
    with without("window"):
        assert bounds_leak(model) is not None


def sharp(name: str, config: dict[str, Any], factor: int) -> Any:
    """A model in bfloat16 of many layers, as sure of its tokens as one that was trained."""
    config = config | {"num_hidden_layers": 24, "hidden_size": 64}
    model = make_model(make_config(name, config), attention.NAME).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.ndim == 2 else 1)
    return model


def test_a_model_that_does_not_say_where_its_windows_are_is_caught() -> None:
    model = make_model(make_config("Mistral", {"sliding_window": 6}), attention.NAME)
    with without("window"):
        assert "do not say" in str(bounds_leak(model))


@pytest.mark.parametrize("name", ["Mamba", "Lfm2", "FalconH1", "Bamba"])
def test_recurrent_layers_are_seen_in_the_outputs_alone(name: str) -> None:
    """The config may not tell: an unknown architecture must be caught by what it computes."""
    assert packing_leak(make_model(make_config(name, UNPACKABLE[name]), attention.NAME)) is not None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_that_ignores_the_layout_is_caught(implementation: str) -> None:
    assert packing_leak(make_model(make_config("Llama", {}), implementation))


def test_a_model_that_ignores_its_positions_is_caught() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    plain = model.forward

    def forward(position_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        return plain(position_ids=torch.arange(inputs["input_ids"].shape[1])[None], **inputs)

    model.forward = forward
    assert "off by" in str(packing_leak(model))


def test_experts_are_no_leak() -> None:
    """Experts gather tokens of the whole row: the last bits may differ, and that is rounding, not a leak."""
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    experts |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    for name in ("Mixtral", "Qwen2Moe", "Qwen3Moe"):
        assert packing_leak(make_model(make_config(name, experts), attention.NAME)) is None, name


def test_the_attention_without_a_layout_is_an_error() -> None:
    model = make_model(make_config("Llama", {}), attention.NAME)
    with pytest.raises(ValueError, match="layout"):
        model(input_ids=torch.arange(5)[None])


ROW_ROUTE: dict[str, PretrainedConfig] = {
    "sliding mistral": make_config("Mistral", {"sliding_window": 6}),
    "gemma2": make_config("Gemma2", {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0,
                                     "final_logit_softcapping": 3.0}),
    "granite": make_config("Granite", {"logits_scaling": 4.0}),
    "cohere": make_config("Cohere", {"logit_scale": 0.25}),
    "mamba": make_config("Mamba", {"state_size": 4}),
    "bamba": make_config("Bamba", {"attn_layer_indices": [1], **MAMBA}),
}  # fmt: skip
if hasattr(transformers, "DoryConfig"):  # since 5.24; its layers run several times, and it ignores `past_key_values`
    dory = {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1}
    ROW_ROUTE["dory"] = make_config("Dory", dory)


@pytest.mark.parametrize("name", ROW_ROUTE)
def test_the_row_route_is_right(name: str) -> None:
    """Rollout, then scoring in packs of one completion, against one plain forward of each sequence."""
    model = make_model(ROW_ROUTE[name], None)
    if name == "bamba" and model(torch.arange(3)[None], use_cache=True).get("past_key_values") is None:
        pytest.skip("this release of transformers hands the state of Bamba to nobody")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    lengths, temperature = [3, 15], 0.8
    prompts = [Prompt(n, [(5 * k + n) % 57 + 3 for k in range(length)], "") for n, length in enumerate(lengths)]
    requests = [Request(slot, sample, prompts[slot].ids, stream_key(0, slot, sample))
                for slot in range(2) for sample in range(3)]  # fmt: skip
    completions = decode_all(RowDecoder([2, 9], 14), model, requests, Sampling(temperature))
    assert any(len(c.ids) > 8 for c in completions)
    batch = batch_of(prompts, completions)
    policy = Policy(copy.deepcopy(model), PolicyOptions(temperature))
    planned = plan(lengths, batch.group.tolist(), batch.lengths.tolist(), [True] * 6, max_tokens=100, num_ranks=1,
                   share_prompts=False)  # fmt: skip
    scored = torch.full((len(batch.tokens),), torch.nan)
    with torch.no_grad():
        for pieces in planned[0]:
            pack = make_pack(batch, pieces, share_prompts=False)
            scored[pack.token] = policy(pack)[0]
        expected = []
        for request, completion in zip(requests, completions, strict=True):
            row = torch.tensor([request.prompt + completion.ids])
            logits = model(input_ids=row, use_cache=False).logits[0, len(request.prompt) - 1 : -1]
            rows = torch.log_softmax(logits / temperature, -1)
            expected.append(rows.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0])
    assert torch.allclose(batch.sampled_logprobs, torch.cat(expected), atol=1e-4), "the engine's"
    assert torch.allclose(scored, torch.cat(expected), atol=1e-4), "the trainer's"
