"""Which attention is used is asked of the loaded model, and its training mode never changes what it computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_dist.model import attention
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.policy import Policy, recompute_layers
from grpo_dist.rollout.own_attention import require_no_noise, settle_attention
from grpo_dist.rollout.probe import draws, is_noisy, probe_pack, row_fault

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "initializer_range": 0.3}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "roformer": {"is_decoder": True},
}
"""Models whose code has no attention but eager."""
NOISY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.5, "attention_dropout": 0.5},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.5, "attention_dropout": 0.5},
}
"""Models that draw random numbers in training mode, each in ways and under names of its own."""


def build(kind: str, implementation: str | None, **options: Any) -> Any:
    """A random model in eval mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def settle(model: Any, given: str | None, obstacle: str | None = None, named: bool = False) -> str | None:
    """Settle a single model on a single rank."""
    return settle_attention([model], given, obstacle, named, lambda thing: [thing])


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_that_cannot_share_prompts_falls_back_to_attention_that_is_causal(kind: str) -> None:
    if kind == "roformer" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("its code makes its mask otherwise, in some releases without regard to the order of tokens")
    model = build(kind, attention.NAME, **TYPES[kind])
    if model._supports_sdpa:
        pytest.skip("in this release its code has other attention, too")
    assert settle(model, attention.NAME) is not None
    assert row_fault(model) is None
    assert model.config._attn_implementation == "eager"


def test_a_model_that_counts_positions_otherwise_keeps_its_own() -> None:
    """RoBERTa's family begins after the padding token's id, which is 0 here."""
    model = build("camembert", attention.NAME, is_decoder=True)
    assert settle(model, attention.NAME) == "its own code does not count positions from 0"
    assert model.config._attn_implementation == "sdpa" and row_fault(model) is None


def test_the_fallback_prefers_sdpa() -> None:
    model = build("qwen2", attention.NAME)
    assert settle(model, attention.NAME) is None
    assert settle(model, attention.NAME, obstacle="its config") == "its config"
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_sees_later_tokens_is_refused_by_name() -> None:
    model = build("bert", "sdpa")  # an encoder
    with pytest.raises(UnfitModel, match=r"model\.name: BertLMHeadModel .*eager: outputs depend on later tokens"):
        settle(model, None, obstacle="its config")


def test_a_named_attention_is_the_only_one_tried() -> None:
    model = build("camembert", attention.NAME, is_decoder=True)
    with pytest.raises(UnfitModel, match=r"model\.attn_implementation: .*grpo_dist: "):
        settle(model, "grpo_dist", obstacle="as model.attn_implementation asks", named=True)
    assert settle(build("qwen2", "eager"), "eager", obstacle="named", named=True) == "named"


def test_sdpa_which_has_no_soft_cap_is_not_taken_for_a_model_with_one() -> None:
    """Some releases of transformers compute it without the cap and say nothing."""
    model = build("gemma2", "eager", head_dim=8)
    assert settle(model, None, obstacle="its config") == "its config"
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UnfitModel, match=r"model\.attn_implementation: .*sdpa: it has no soft cap"):
        settle(model, "sdpa", obstacle="named", named=True)
    model.config._attn_implementation = "sdpa"  # as some releases load it
    assert settle(model, None, obstacle="its config") == "its config"
    assert model.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("error")
def test_devices_of_other_ranks_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    before = torch.get_rng_state()
    assert draws(lambda: torch.rand(1)) and not draws(lambda: torch.ones(1))
    assert is_noisy(lambda: torch.rand(1)) and not is_noisy(lambda: torch.ones(1))
    assert torch.equal(torch.get_rng_state(), before)


def in_training(policy: Policy) -> Tensor:
    """Log-probabilities of a tiny completion as an update computes them."""
    return policy.train()(probe_pack(policy.causal_lm, shared_prompts=False))[0]


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", NOISY)
def test_a_base_in_training_computes_as_in_a_rollout(kind: str, recomputes: bool) -> None:
    model = build(kind, "eager", **NOISY[kind])
    pack = probe_pack(model, shared_prompts=False)
    assert is_noisy(lambda: model.train()(input_ids=pack.ids[None], use_cache=False).logits)
    if recomputes:
        recompute_layers(model)
        model.enable_input_require_grads()
    policy = Policy(get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")))
    expected = policy.eval()(pack)[0]
    assert not is_noisy(lambda: in_training(policy))
    assert torch.equal(in_training(policy), expected)
    with torch.no_grad():
        assert torch.equal(in_training(policy), expected)
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    calls: Counter[nn.Module] = Counter()
    for module in layers[0].modules():
        if isinstance(module, nn.Linear):  # an activation may be called for each expert
            module.register_forward_hook(lambda module, *_: calls.update([module]))
    in_training(policy).sum().backward()
    assert max(calls.values()) == 1 + recomputes, "the backward pass computes a recomputed layer once more"
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    assert gradients and any(bool(gradient.any()) for gradient in gradients)


def test_adapter_dropout_and_no_other_is_on_in_training() -> None:
    model = build("opt", "eager", **NOISY["opt"])
    lora = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM")
    policy = Policy(get_peft_model(model, lora))
    assert is_noisy(lambda: in_training(policy))
    with policy.model.disable_adapter():
        assert not is_noisy(lambda: in_training(policy))


def test_noise_that_no_mode_turns_off_is_found() -> None:
    model = build("qwen2", "eager")
    norm = model.model.norm
    plain = norm.forward
    policy = Policy(model).train()
    passes: Counter[str] = Counter()
    policy.register_forward_hook(lambda *_: passes.update(["pass"]))
    require_no_noise(policy, policy, False, lambda thing: [thing])
    assert passes["pass"] == 1, "where nothing is drawn, nothing is compared"
    norm.forward = lambda hidden: nn.functional.dropout(plain(hidden), 0.1)
    with pytest.raises(UnfitModel, match=r"model\.name: Qwen2ForCausalLM draws random numbers"):
        require_no_noise(policy, policy, False, lambda thing: [thing])


def test_numbers_that_are_drawn_and_not_used_are_no_noise() -> None:
    model = build("qwen2", "eager")
    norm = model.model.norm
    plain = norm.forward
    norm.forward = lambda hidden: plain(hidden + 0 * torch.rand_like(hidden))
    policy = Policy(model).train()
    state = torch.get_rng_state()
    assert draws(lambda: in_training(policy))
    assert torch.equal(torch.get_rng_state(), state)
    require_no_noise(policy, policy, False, lambda thing: [thing])


def test_ranks_compare_passes_if_any_rank_draws() -> None:
    """A pass is a collective under ZeRO-3."""
    policy = Policy(build("qwen2", "eager")).train()
    passes: Counter[str] = Counter()
    policy.register_forward_hook(lambda *_: passes.update(["pass"]))
    require_no_noise(policy, policy, False, lambda _: [False, True] if passes["pass"] == 1 else [False, False])
    assert passes["pass"] == 7


def test_recomputing_gives_the_same_gradients() -> None:
    gradients = []
    for recomputes in (False, True):
        model = build("opt", "eager", **NOISY["opt"])
        if recomputes:
            recompute_layers(model)
        in_training(Policy(model)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
