"""The fused layer against PEFT's own, in values and gradients, and the layers it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from grpo_dist.model import lora
from grpo_dist.model.lora import adapted_linear, fuse_adapters


def qwen() -> nn.Module:
    """A tiny model with biases in some of its linear layers."""
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip


def gpt2() -> nn.Module:
    """A tiny model whose linear layers hold their weights transposed."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
                                      embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2))  # fmt: skip


def adapted(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """The model with adapters that do something."""
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, lora_dropout=dropout, target_modules="all-linear",
                                            task_type="CAUSAL_LM"))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return made


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the adapters."""
    logits = model(torch.arange(20).view(2, 10)).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def never(_: Tensor) -> bool:
    """No weight is sharded."""
    return False


@pytest.mark.parametrize("make", [qwen, gpt2])
def test_a_model_computes_what_it_computed(make: object) -> None:
    torch.manual_seed(0)
    plain = adapted(make())  # type: ignore[operator]
    fused = copy.deepcopy(plain)
    fuse_adapters(fused, never)
    (expected, gradients), (got, own) = run(plain), run(fused)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert own.keys() == gradients.keys() and len(own) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-7)
    with fused.disable_adapter(), plain.disable_adapter():
        ids = torch.arange(10)[None]
        assert torch.equal(fused(ids).logits, plain(ids).logits)


class Projections(nn.Module):
    """Layers of one input, of which the values may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
        self.has_values = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.q_proj(x) + self.k_proj(x).repeat(1, 2)
        return y * self.v_proj(x).repeat(1, 2) if self.has_values else y


@pytest.mark.parametrize("has_values", [True, False])
def test_layers_of_one_input_are_one_operation(has_values: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. A module that does not call them all has each by itself from its second call on."""
    torch.manual_seed(0)
    calls: list[int] = []
    computed = lora._computed
    monkeypatch.setattr(lora, "_shares_products", lambda _: True)
    monkeypatch.setattr(lora, "_computed", lambda layers, *given: calls.append(len(layers)) or computed(layers, *given))
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"k_proj": 2},
                        alpha_pattern={"k_proj": 4})  # fmt: skip
    plain = get_peft_model(Projections(), config)
    plain.base_model.model.has_values = has_values
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape)
    fused = copy.deepcopy(plain)
    fuse_adapters(fused, never)
    for n in range(3):
        x, own = (torch.full((5, 8), n + 0.5).requires_grad_() for _ in range(2))
        expected, got = plain(x), fused(own)
        torch.testing.assert_close(got, expected)
        for y in (expected, got):
            y.square().sum().backward()
        torch.testing.assert_close(own.grad, x.grad)
    for (name, parameter), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if parameter.requires_grad:
            expected, got = (torch.zeros_like(x) if x.grad is None else x.grad for x in (parameter, other))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=name)
    assert calls == ([3, 3, 3] if has_values else [3, 1, 1, 1, 1])


def test_finite_differences() -> None:
    shapes = ((3, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, weight, bias, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    frozen = weight.detach(), bias.detach()
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_linear(x, *frozen, a, b, 1.7), (x, a, b))
    expected = x @ weight.T + bias + 1.7 * (x @ a.T) @ b.T
    torch.testing.assert_close(adapted_linear(x, *frozen, a, b, 1.7), expected)
    kept = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_linear(x, *frozen, a, b, 1.7, kept), (x, a, b))
    expected = x @ weight.T + bias + 1.7 * ((x * kept) @ a.T) @ b.T
    torch.testing.assert_close(adapted_linear(x, *frozen, a, b, 1.7, kept), expected)


@pytest.mark.parametrize("bias", [None, torch.full((64,), 0.3, dtype=torch.bfloat16)], ids=["plain", "biased"])
@pytest.mark.parametrize("moved", [1e-6, 1e-4])
def test_a_small_update_is_not_rounded_away_in_16_bits(moved: float, bias: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, a = (torch.randn(s, generator=generator).bfloat16() for s in ((512, 256), (64, 256), (16, 256)))
    b = (torch.randn(64, 16, generator=generator).sign() * moved).bfloat16()
    y, plain = (adapted_linear(x, weight, bias, a, each, 2.0).double() for each in (b, torch.zeros_like(b)))
    exact = 2.0 * (x.double() @ a.double().T) @ b.double().T
    assert float(((y - plain) * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.25)


def test_no_tokens() -> None:
    x, weight, a, b = torch.zeros(0, 5, requires_grad=True), torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2)
    assert adapted_linear(x, weight, None, a, b, 1.0).shape == (0, 4)


@pytest.mark.parametrize("kind", ["dropout", "sharded", "transposed"])
def test_layers_left_as_they_were(kind: str) -> None:
    """PEFT's own forward answers: dropout draws in it, and sharded weights are made whole in it."""
    model = adapted(gpt2() if kind == "transposed" else qwen(), dropout=0.3 if kind == "dropout" else 0.0)
    calls: list[Tensor] = []

    def sharded(weight: Tensor) -> bool:
        calls.append(weight)
        return kind == "sharded"

    plain = copy.deepcopy(model).eval()
    fuse_adapters(model, sharded)
    ids = torch.arange(10)[None]
    assert torch.equal(model.eval()(ids).logits, plain(ids).logits)
    assert bool(calls) == (kind == "sharded")


@pytest.mark.parametrize("sharded", ["base_layer.weight", "lora_A", "lora_B"])
def test_one_sharded_weight_of_a_layer_is_enough(sharded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(qwen())
    names = {parameter: name for name, parameter in model.named_parameters()}
    fuse_adapters(model, lambda weight: sharded in names[weight])  # type: ignore[index]
    monkeypatch.setattr(lora, "_computed", lambda *_: pytest.fail("PEFT's own forward gathers the weight"))
    model(torch.arange(10)[None])
