"""Adapters on experts: exact beside PEFT's in float32, and kept in 16 bits, where PEFT's are rounded away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from small_experts import build, make_experts
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model.expert_adapters import _let_linear_dispatch, _Matrix, expert_parameters
from grpo_dist.model.export import adapter_state, kept_shares, merged_state, write_adapter, write_merged
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.load import adapted_layers, load_causal_lm, make_policy, trainable
from grpo_dist.model.policy import Policy
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.rollout import Request, RowDecoder, decode_all
from grpo_dist.rollout.fidelity import update_share

KINDS = ["qwen3_moe", "mixtral", "gpt_oss"]
LORA = LoraConfig(r=3, alpha=6.0, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
IDS = torch.tensor([[5, 9, 33, 60, 7, 12, 80, 41]])


def moved(
    kind: str, dtype: torch.dtype = torch.float32, by: float = 0.05, lora: LoraConfig = LORA, base: Any = None
) -> Policy:
    """A policy whose adapters have learned, on `base` or a model of the type."""
    policy = make_policy(base or build(kind, "eager").to(dtype), ModelConfig(), lora).eval()
    torch.manual_seed(1)
    for name, parameter in trainable(policy).items():
        if "lora_B" in name:
            parameter.data.add_(torch.randn(parameter.shape) * by)
    return policy


def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_peft_computes(kind: str) -> None:
    """Outputs and gradients, in float32, where adding to the weights loses nothing."""
    outcomes = []
    for fused in (True, False):
        policy = moved(kind)
        wrappers = [module for module in policy.modules() if isinstance(module, ParamWrapper)]
        assert len(wrappers) == 4 and len(adapted_layers(policy)) == 4 + 8, "two tensors in each of two layers"
        if not fused:
            for wrapper in wrappers:
                wrapper.__dict__.pop("forward", None)
        output = logits(policy.causal_lm)
        output.square().sum().backward()
        outcomes.append([output, *(p.grad for p in trainable(policy).values())])
        with policy.model.disable_adapter():
            torch.testing.assert_close(logits(policy.causal_lm), logits(build(kind, "eager")))
    assert all(float(each.norm()) > 0 for each in outcomes[0])
    for ours, theirs in zip(*outcomes, strict=True):
        assert float((ours - theirs).norm()) < 3e-5 * float(theirs.norm())


def test_experts_are_only_multiplied_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that computes anything else with them would compute it without their adapters."""
    matrix: Any = _Matrix(torch.eye(3), torch.ones(3, 1), torch.ones(1, 3), 2.0)
    x = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.equal(functional.linear(x, matrix, x), x + 14 + x) and torch.equal(x @ matrix, x + 14)
    for other in (torch.add, lambda x, y: torch.matmul(y, x.T), lambda x, y: functional.linear(x, weight=y)):
        with pytest.raises(TypeError, match="expected a product from its left"):
            other(x, matrix)

    def doubles(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return 2 * linear(x, weight, bias)

    linear = functional.linear
    monkeypatch.setattr(functional, "linear", doubles)  # as ZeRO-3 sets one of its own
    for _ in range(2):
        _let_linear_dispatch()
        assert torch.equal(functional.linear(x, matrix), x + 14)
        assert torch.equal(functional.linear(x, torch.eye(3)), 2 * x)
    once = functional.linear
    _let_linear_dispatch()
    assert functional.linear is once


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_update_is_in_the_rollout_in_16_bits(kind: str) -> None:
    policy = moved(kind, torch.bfloat16, by=1e-4)
    rollout = RolloutModel(policy, torch.bfloat16, "eager")
    with rollout.open() as model:
        assert torch.equal(logits(model), logits(policy.causal_lm))
        share = update_share(model, merged=False)
    assert share is not None and 0.99 <= share <= 1.01
    (kept,) = kept_shares(policy, [torch.bfloat16], True)
    assert kept is not None and kept < 0.5, "added to the weights it would be lost"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_computes_what_was_trained(kind: str, tmp_path: Path) -> None:
    base = make_experts(tmp_path / "base", kind)
    policy = moved(kind, base=load_causal_lm(ModelConfig(base), torch.float32, "eager"))
    expected = logits(policy.causal_lm)
    write_merged(policy.causal_lm, merged_state(policy, True, torch.float32), None, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    assert isinstance(policy.model, PeftModel)
    write_adapter(policy.model, adapter_state(policy, True), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    assert not torch.allclose(logits(plain), expected, atol=1e-2)
    again = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_computes_what_a_forward_pass_does(kind: str) -> None:
    policy = moved(kind)
    requests = [Request(0, sample, IDS[0].tolist(), key=sample) for sample in range(2)]
    for answer in decode_all(RowDecoder([256], 5), policy.causal_lm, requests):
        row = torch.tensor([IDS[0].tolist() + answer.ids])
        rows = policy.causal_lm(input_ids=row, use_cache=False).logits[0].log_softmax(-1)[IDS.shape[1] - 1 : -1]
        torch.testing.assert_close(rows.gather(1, torch.tensor(answer.ids)[:, None])[:, 0],
                                   torch.tensor(answer.logprobs), rtol=0, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_attention_alone_leave_experts_plain(kind: str) -> None:
    names = adapted_layers(moved(kind, lora=LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"} and len(names) == 4


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("mlp.gate.weight", "is no tensor of several experts"),
        ("experts.up_proj", "is no parameter of it"),
        ("experts.gate_up", "is no parameter of it"),
    ],
)
def test_a_name_that_means_no_experts_is_refused(target: str, reason: str) -> None:
    message = rf"lora.target_parameters: '{target}' given, which {reason}.*expected mlp\.experts\.down_proj, mlp"
    with pytest.raises(UnfitModel, match=message):
        moved("qwen3_moe", lora=LoraConfig(target_parameters=[target]))


def test_names_of_experts_are_short_in_a_larger_model() -> None:
    larger = torch.nn.ModuleDict({"language_model": build("mixtral", "eager")})
    with pytest.raises(UnfitModel, match=r"expected mlp\.experts\.down_proj, mlp"):
        expert_parameters(larger, ["experts.up_proj"])


def test_what_experts_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora.dropout: 0.1 given, expected 0 with lora.target_parameters"):
        LoraConfig(dropout=0.1, target_parameters=["experts.down_proj"])
