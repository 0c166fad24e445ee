"""The model that draws completions is the policy that is trained, in every way of decoding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention
from grpo_dist.model.block_attention import block_layout
from grpo_dist.model.load import make_policy, trainable
from grpo_dist.model.policy import Policy
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.rollout import Decoder, PagedDecoder, Request, RowDecoder, decode_all, paged_obstacle
from grpo_dist.rollout.fidelity import update_share
from grpo_dist.rollout.native.cache import DecodeState
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.llama import LlamaStep
from grpo_dist.rollout.native.steps import Step, module_step, prefill

IDS = torch.arange(24) % 61
LORAS = {
    "all-linear": LoraConfig(r=4, alpha=6.0), "three": LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"]),
    "dropout": LoraConfig(r=4, dropout=0.3), "full": None,
}  # fmt: skip
SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


def make(
    lora: LoraConfig | None, dtype: torch.dtype = torch.float32, *, tied: bool = False,
    attn_implementation: str = attention.NAME,
) -> Policy:  # fmt: skip
    """A policy of random weights, its adapters as they are before the first step."""
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, tie_word_embeddings=tied)
    base = Qwen2ForCausalLM._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.5 if name.endswith("bias") else 0.1))
    policy = make_policy(base, ModelConfig(), lora)
    return policy.train()


def step(policy: Policy, learning_rate: float) -> None:
    """Move what is trained as Adam's first step does: every entry by the learning rate."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(policy).values():
            parameter.add_(torch.randn(parameter.shape).sign() * learning_rate)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits (T, V) of one fixed sequence."""
    positions, layout = torch.arange(len(IDS)), block_layout([(len(IDS), [])])
    return model(input_ids=IDS[None], position_ids=positions[None], use_cache=False, layout=layout).logits[0]


@torch.inference_mode()
def decoded(step_of: Callable[[nn.Module], Step], model: nn.Module) -> Tensor:
    """Logits (T, V) of the same sequence, each token but the first a step of decoding."""
    decode, (layout, first) = step_of(model), prefill(model, [IDS[:1].tolist()])
    state, rows = DecodeState(IDS.device, len(IDS), shares=True, whole_chunks=False), [first]
    state.admit(layout, [1])
    for place in range(1, len(IDS)):
        state.make_room()
        state.begin_step()
        rows.append(decode(IDS[place : place + 1], torch.tensor([place]), state).float())
        state.end_step()
        state.count_step()
    return torch.cat(rows)


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_follows_the_policy(lora: LoraConfig | None, tied: bool) -> None:
    policy = make(lora, tied=tied)
    rollout_model = RolloutModel(policy, torch.float32, attention.NAME)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    for _ in range(2):
        old = logits(policy.eval().causal_lm)
        step(policy, 0.1)
        rollout_model.sync()
        target = logits(policy.causal_lm)
        policy.train()
        assert float((target - old).abs().max()) > 0.1, "the step must show"
        with rollout_model.open() as model:
            for got in (logits(model), *(decoded(each, model) for each in (module_step, LlamaStep, KernelStep))):
                assert float((got - target).abs().max()) < 1e-4
            assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(KeyError), rollout_model.open():
        raise KeyError("a rollout that fails")
    assert {name: p.shape for name, p in policy.named_parameters()} == {name: p.shape for name, p in before.items()}
    assert policy.training and all(p.requires_grad == (lora is None or ".lora_" in name)
                                   for name, p in policy.named_parameters())  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_weights_are_the_policys_own(dtype: torch.dtype) -> None:
    policy = make(LORAS["all-linear"], dtype)
    rollout_model = RolloutModel(policy, dtype, attention.NAME)
    assert all(p.is_meta for p in rollout_model.tree.parameters())
    with rollout_model.open():
        own = {p.data_ptr() for p in policy.parameters()}
        assert all(p.data_ptr() in own for p in rollout_model.tree.parameters())
    assert all(p.is_meta for p in rollout_model.tree.parameters())


with_paged = pytest.mark.skipif(paged_obstacle() is not None, reason=str(paged_obstacle()))


@pytest.mark.parametrize("make_decoder", [
    pytest.param(lambda: RowDecoder([-1], 4), id="rows"),
    pytest.param(lambda: PagedDecoder([-1], 4, 64), id="paged", marks=with_paged),
])  # fmt: skip
def test_other_decoders_compute_with_adapters_apart(make_decoder: Callable[[], Decoder]) -> None:
    policy = make(LORAS["all-linear"], torch.bfloat16, attn_implementation="sdpa")
    rollout_model, requests = RolloutModel(policy, torch.bfloat16, "sdpa"), [Request(0, 0, IDS[:5].tolist(), key=1)]
    own, called, drawn = {p.data_ptr() for p in policy.parameters()}, [], []
    for module in rollout_model.tree.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_pre_hook(lambda layer, _: called.append(
                layer.merged or layer.disable_adapters or layer.base_layer.weight.data_ptr() not in own
            ))  # fmt: skip
    for learned in (0.0, 0.1):
        step(policy, learned)
        with rollout_model.open() as model:
            drawn += decode_all(make_decoder(), model, requests)
    assert len(called) >= 2 * 4 * 14 and not any(called)
    assert drawn[0].logprobs != drawn[1].logprobs


def test_weights_trained_in_float32_and_computed_with_in_16_bits_are_held_twice() -> None:
    policy = make(None, torch.float32, tied=True)
    rollout_model = RolloutModel(policy, torch.bfloat16, attention.NAME)
    step(policy, 0.1)
    rollout_model.sync()
    with rollout_model.open() as model:
        theirs = policy.causal_lm.state_dict()
        assert all(torch.equal(value, theirs[name].bfloat16()) for name, value in model.state_dict().items())
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def share(now: Tensor, before: Tensor, exact_now: Tensor, exact_before: Tensor) -> float:
    """How much of the exact change is in the other."""
    exact = (exact_now - exact_before).double()
    return float(((now.double() - before.double()) * exact).sum() / (exact * exact).sum())


@pytest.mark.parametrize("step_of", [module_step, LlamaStep, KernelStep])
@pytest.mark.parametrize("learning_rate", [1e-6, 1e-5])
def test_a_first_small_step_reaches_the_rollout(step_of: Callable[[nn.Module], Step], learning_rate: float) -> None:
    policy = make(LORAS["all-linear"])
    rollout_model = RolloutModel(policy, torch.float32, attention.NAME)
    exact = make(LORAS["all-linear"]).double().eval()
    result = []
    for _ in range(2):
        with rollout_model.open() as model:
            result.append((decoded(step_of, model), logits(exact.causal_lm)))
        for each in (policy, exact):
            step(each, learning_rate)
    (before, exact_before), (now, exact_now) = result
    assert share(now, before, exact_now, exact_before) == pytest.approx(1, abs=0.01 if learning_rate > 5e-6 else 0.05)


@pytest.mark.parametrize(("dtype", "merged"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)])
@pytest.mark.parametrize("learning_rate", [1e-6, 1e-5])
def test_the_share_of_a_first_step_that_decodes(learning_rate: float, dtype: torch.dtype, merged: bool) -> None:
    policy = make(LORAS["three"], dtype)
    rollout_model = RolloutModel(policy, dtype, attention.NAME)
    with rollout_model.open() as model:
        assert update_share(model, merged=merged) is None, "nothing has been learned yet"
    step(policy, 1e-14)
    with rollout_model.open() as model:
        assert update_share(model, merged=merged) is None, "float32 has no digit for it"
    step(policy, learning_rate)
    with rollout_model.open() as model:
        assert update_share(model, merged=merged) == pytest.approx(1, abs=0.01)


def test_the_share_of_adapters_beside_weights_that_bfloat16_holds() -> None:
    """Whole where they stay apart, and what merging leaves of them where they do not."""
    policy = make(LORAS["three"])
    for parameter in policy.parameters():
        parameter.data = parameter.data.bfloat16().float()
    step(policy, 1e-7)
    with RolloutModel(policy, torch.float32, attention.NAME).open() as model:
        assert update_share(model, merged=True, compact=True) == 1 != update_share(model, merged=True)


def test_what_is_not_trained_is_frozen() -> None:
    """With adapters the base is, also after a step; without them nothing is, and neither is a copy."""
    policy = make(LORAS["three"])
    rollout_model = RolloutModel(policy, torch.float32, attention.NAME)
    for _ in range(2):
        with rollout_model.open() as model:
            for name, parameter in model.named_parameters():
                assert rollout_model.is_frozen(parameter) == (".lora_" not in name), name
                assert rollout_model.is_frozen(parameter[:1]) == (".lora_" not in name), name
        step(policy, 1e-3)
    assert not rollout_model.is_frozen(torch.ones(3))
    for dtype in (torch.float32, torch.bfloat16):
        rollout_model = RolloutModel(make(None), dtype, attention.NAME)
        with rollout_model.open() as model:
            assert not any(map(rollout_model.is_frozen, model.parameters()))


def test_the_share_is_what_rounded_weights_have_of_an_update() -> None:
    policy = make(LORAS["all-linear"], torch.bfloat16)
    step(policy, 1e-5)
    result = total = 0.0
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            weight, exact = module.base_layer.weight, module.get_delta_weight("default").double()
            rounded = (weight.float() + exact.float()).bfloat16()
            result += float(((rounded - weight).double() * exact).sum())
            total += float(exact.square().sum())
    with RolloutModel(policy, torch.bfloat16, attention.NAME).open() as model:
        assert update_share(model, merged=True) == pytest.approx(result / total, abs=1e-3)
    assert result / total < 0.5
