"""Optimizers other than AdamW: which weights they take, what a checkpoint keeps of them, and where they are refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.config.schema import Config, LoraConfig, ModelConfig, OptimConfig
from grpo_dist.distributed.launch_config import require_optimizer
from grpo_dist.distributed.optimizer_state import OptimizerState, WholeOptimizerState
from grpo_dist.distributed.ranks import Ranks
from grpo_dist.model.load import make_policy, trainable
from grpo_dist.model.optimizer import make_optimizer, orthogonal
from grpo_dist.model.policy import Policy, PolicyOptions

with_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has Muon")
with_8bit = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra `quantized`")
OTHERS = ["muon", pytest.param("adamw_8bit", marks=with_8bit)]


def make(optimizer: Any, lora: LoraConfig | None, *, has_critic: bool = False) -> tuple[Policy, Any]:
    """A small policy with its optimizer."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    ))  # fmt: skip
    policy = make_policy(base, ModelConfig(), lora, PolicyOptions(has_critic=has_critic))
    config = Config(lora=lora, optim=OptimConfig(learning_rate=1e-3, optimizer=optimizer, weight_decay=0.01))
    return policy, make_optimizer(policy, config)


def steps(policy: Policy, optimizer: Any, first: int, count: int) -> None:
    """Steps with gradients that depend on the step alone."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + step) * group["rate_share"]
        for parameter in trainable(policy).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_muon_takes_the_matrices_of_layers() -> None:
    policy, optimizer = make("muon", None, has_critic=True)
    kinds = {name: "momentum" in str(optimizer.state[p].keys()) for name, p in taken(policy, optimizer).items()}
    assert {name for name, is_muon in kinds.items() if not is_muon} == {
        name for name in kinds if "norm" in name or "embed" in name or "head" in name or name.endswith("bias")
    }
    assert sum(kinds.values()) == 7


def taken(policy: Policy, optimizer: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters, after a step of the optimizer."""
    steps(policy, optimizer, 0, 1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
        map(id, trainable(policy).values())
    )
    return trainable(policy)


@with_muon
def test_muon_and_adamw_step_as_torch_s_own() -> None:
    policy, optimizer = make("muon", None)
    twin, _ = make("muon", None)
    start = {name: parameter.detach().clone() for name, parameter in trainable(twin).items()}
    steps(policy, optimizer, 0, 3)
    is_muon = [p.ndim == 2 and "embed" not in name and "lm_head" not in name for name, p in trainable(twin).items()]
    parameters = list(trainable(twin).values())
    muon = torch.optim.Muon([p for p, yes in zip(parameters, is_muon, strict=True) if yes], 1e-3, 0.01,
                            adjust_lr_fn="match_rms_adamw")  # fmt: skip
    adamw = torch.optim.AdamW([p for p, yes in zip(parameters, is_muon, strict=True) if not yes], weight_decay=0.01)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for each in (muon, adamw):
            each.param_groups[0]["lr"] = 1e-3 / (1 + step)
            each.step()
    for (name, parameter), yes in zip(trainable(policy).items(), is_muon, strict=True):
        expected = trainable(twin)[name]
        if not yes:
            torch.testing.assert_close(parameter, expected, atol=1e-7, rtol=1e-6, msg=name)
        else:  # torch's is in bfloat16
            change = float((expected - start[name]).norm())
            assert 0 < float((parameter - expected).norm()) < 0.02 * change, name


def test_an_orthogonal_matrix_is_near_that_of_the_singular_value_decomposition() -> None:
    for shape in ((6, 40), (40, 6)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        got = orthogonal(matrix)
        singular = torch.diagonal(u.T @ got @ v.T)
        assert values.min() > 0 and singular.min() > 0.6 and singular.max() < 1.25
        torch.testing.assert_close(u @ torch.diag(singular) @ v, got, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lora", [LoraConfig(r=64), None], ids=["adapters", "all weights"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_goes_on_bit_for_bit(name: Any, lora: LoraConfig | None) -> None:
    ranks = Ranks(torch.float32, OptimConfig())
    policies: list[dict[str, torch.Tensor]] = []
    saved: dict[str, torch.Tensor] = {}
    for resumes in (False, True):
        policy, optimizer = make(name, lora)
        wrapped, prepared = ranks.prepare(policy, optimizer)
        state = WholeOptimizerState(ranks, prepared, trainable(policy))
        if resumes:
            state.restore(saved)
            steps(wrapped, prepared, 3, 3)
        else:
            steps(wrapped, prepared, 0, 3)
            saved = {key: value.clone() for key, value in state.collect().items()}
            steps(wrapped, prepared, 3, 3)
        policies.append(state.collect())
    assert policies[0].keys() == policies[1].keys()
    for key, value in policies[0].items():
        assert value.dtype == policies[1][key].dtype and torch.equal(value, policies[1][key]), key
    if name == "adamw_8bit":
        assert any(value.dtype == torch.uint8 for value in saved.values())


def test_only_one_of_equal_ranks_copies_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(torch.float32, OptimConfig())
    policy, optimizer = make("adamw", None)
    wrapped, prepared = ranks.prepare(policy, optimizer)
    steps(wrapped, prepared, 0, 2)
    monkeypatch.setattr(Ranks, "is_main", False)
    monkeypatch.setattr(ranks.strategy, "fragment", None)
    assert OptimizerState(ranks, prepared, trainable(policy)).collect() == {"adam_steps": 2}


@pytest.mark.parametrize("kind", [OptimizerState, WholeOptimizerState])
def test_weights_that_are_lost_or_missing_are_refused(kind: Any) -> None:
    """They would be as if they had not been trained."""
    ranks = Ranks(torch.float32, OptimConfig())
    policy, optimizer = make("adamw", LoraConfig(r=4))
    _, prepared = ranks.prepare(policy, optimizer)
    state = kind(ranks, prepared, trainable(policy))
    saved = state.collect()
    if kind is WholeOptimizerState:
        state.restore(saved | {"weight/value_head.weight": torch.zeros(3)})  # of a critic that the run has no more
    with pytest.raises(ValueError, match=r"1 trained weights that this run does not train, such as other\.weight"):
        state.restore(saved | {"weight/other.weight": torch.zeros(3)})
    name = min(trainable(policy))
    del saved[f"weight/{name}"]
    with pytest.raises(ValueError, match=f"lacks 1 weights that this run trains, such as {name}"):
        state.restore(saved)


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_what_cannot_be_done_is_refused(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"optim\.optimizer: .* expected adamw with DeepSpeed, or DDP"):
        require_optimizer(OptimConfig(optimizer=name), {"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(ValueError, match="adamw with FSDP"):
        require_optimizer(OptimConfig(optimizer=name), {"ACCELERATE_USE_FSDP": "true"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    if name == "adamw_8bit":
        with pytest.raises(ValueError, match=r"pip install 'grpo_dist\[quantized\]'"):
            require_optimizer(OptimConfig(optimizer=name), {})
    require_optimizer(OptimConfig(), {"ACCELERATE_USE_DEEPSPEED": "true"})
