"""The fused layer against PEFT's own, in values and gradients, and the layers it leaves alone."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import NamedTuple

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


def adapted(model: nn.Module, dropout: float = 0.0, task_type: str | None = "CAUSAL_LM") -> nn.Module:
    """The model with adapters that do something."""
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, lora_dropout=dropout, target_modules="all-linear",
                                            task_type=task_type))  # fmt: skip
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


@pytest.mark.parametrize("make", [qwen, gpt2])
def test_a_model_computes_what_it_computed(make: object) -> None:
    torch.manual_seed(0)
    plain = adapted(make())  # type: ignore[operator]
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
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
    fuse_adapters(fused)
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


@pytest.mark.parametrize(("shares", "alpha"), [(False, 4), (True, 5)], ids=["on a CPU", "of two scales"])
def test_layers_that_are_computed_one_by_one(shares: bool, alpha: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    computed = lora._computed
    monkeypatch.setattr(lora, "_shares_products", lambda _: shares)
    monkeypatch.setattr(lora, "_computed", lambda layers, *given: calls.append(len(layers)) or computed(layers, *given))
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"k_proj": 2},
                        alpha_pattern={"k_proj": alpha})  # fmt: skip
    plain = get_peft_model(Projections(), config)
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape)
    fused, x = copy.deepcopy(plain), torch.randn(5, 8)
    fuse_adapters(fused)
    torch.testing.assert_close(fused(x), plain(x))
    assert calls == [1, 1, 1]


def test_an_output_that_waits_is_that_of_its_own_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_shares_products", lambda _: True)
    plain = adapted(Projections(), task_type=None)
    fused, (first, second) = copy.deepcopy(plain), torch.randn(2, 5, 8)
    fuse_adapters(fused)
    one, other = (model.base_model.model for model in (plain, fused))
    for layer, x in (("q_proj", first), ("q_proj", first), ("k_proj", second), ("k_proj", first)):
        torch.testing.assert_close(getattr(other, layer)(x), getattr(one, layer)(x))


class Gate(nn.Module):
    """The first layers of SwiGLU."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 6, bias=bias), nn.Linear(8, 6, bias=False)


class Adapters(NamedTuple):
    """As the kernels take them."""

    low: Tensor
    gate_b: Tensor
    up_b: Tensor


def gate_in_torch(gate: Tensor, up: Tensor, adapters: Adapters) -> Tensor:
    """What the kernel computes."""
    low = adapters.low.chunk(2, 1)
    return nn.functional.silu(gate + low[0] @ adapters.gate_b.T) * (up + low[1] @ adapters.up_b.T)


def gate_backward_in_torch(grad: Tensor, gate: Tensor, up: Tensor, adapters: Adapters) -> tuple[Tensor, ...]:
    """What its backward kernel computes."""
    inputs = gate.detach().requires_grad_(), up.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(gate_in_torch(*inputs, adapters), inputs, grad)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a gate by torch's operations, in float64: test_triton.py compares the two."""
    names = {"Adapters": Adapters, "gated": gate_in_torch, "gated_backward": gate_backward_in_torch}
    monkeypatch.setitem(sys.modules, "grpo_dist.model.gate_kernel", SimpleNamespace(**names))
    monkeypatch.setattr(lora, "_shares_products", lambda _: True)
    monkeypatch.setattr(lora, "HALVES", (torch.float64,))


def test_a_gate_is_computed_with_the_products_of_its_inputs(kernels: None) -> None:
    torch.manual_seed(0)
    plain = adapted(Gate(), task_type=None).double()
    fused, x = copy.deepcopy(plain), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    fuse_adapters(fused)
    one, own = plain.base_model.model, x.detach().clone().requires_grad_()
    expected, got = (
        nn.functional.silu(one.gate_proj(x)) * one.up_proj(x),
        fused.base_model.model.gate_proj.family.gated(own),
    )
    torch.testing.assert_close(got, expected)
    for y in (expected, got):
        (y.square() * torch.arange(6)).sum().backward()
    torch.testing.assert_close(own.grad, x.grad)
    for (name, parameter), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(other.grad, parameter.grad, msg=name)


@pytest.mark.parametrize("why", ["bias", "ranks", "float32", "disabled"])
def test_a_gate_that_the_kernel_does_not_compute(why: str, kernels: None) -> None:
    ranks = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 4}} if why == "ranks" else {}
    model = get_peft_model(
        Gate(bias=why == "bias"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **ranks)
    )
    dtype = torch.float32 if why == "float32" else torch.float64
    fuse_adapters(model.to(dtype))
    family, x = model.base_model.model.gate_proj.family, torch.randn(5, 8, dtype=dtype)
    if why == "disabled":
        assert family.gated(x) is not None
        with model.disable_adapter():
            assert family.gated(x) is None
    else:
        assert family.gated(x) is None


def test_a_weight_that_is_dequantised_has_the_same_gradients() -> None:
    x, weight, a, b = (torch.randn(shape).requires_grad_() for shape in ((3, 5), (4, 5), (2, 5), (4, 2)))
    frozen = weight.detach()
    expected, got = (torch.autograd.grad(adapted_linear(x, each, None, a, b, 1.7).square().sum(), (x, a, b))
                     for each in (frozen, lambda: frozen))  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


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
def test_layers_left_as_they_were(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own forward answers: dropout draws in it, and sharded weights are made whole in it."""
    model = adapted(gpt2() if kind == "transposed" else qwen(), dropout=0.3 if kind == "dropout" else 0.0)
    calls: list[Tensor] = []

    def sharded(weight: Tensor) -> bool:
        calls.append(weight)
        return kind == "sharded"

    plain = copy.deepcopy(model).eval()
    monkeypatch.setattr(lora, "is_sharded", sharded)
    fuse_adapters(model)
    ids = torch.arange(10)[None]
    assert torch.equal(model.eval()(ids).logits, plain(ids).logits)
    assert bool(calls) == (kind == "sharded")


@pytest.mark.parametrize("sharded", ["base_layer.weight", "lora_A", "lora_B"])
def test_one_sharded_weight_of_a_layer_is_enough(sharded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own forward gathers it."""
    plain = adapted(qwen())
    model = copy.deepcopy(plain)
    names = {parameter: name for name, parameter in model.named_parameters()}
    computed, num_fused = lora._computed, []
    monkeypatch.setattr(lora, "_computed", lambda *given: num_fused.append(1) or computed(*given))
    fuse_adapters(model)
    ids = torch.arange(10)[None]
    model(ids)
    assert len(num_fused) == 14, "all linear layers but the head, while none is sharded"
    monkeypatch.setattr(lora, "is_sharded", lambda weight: sharded in names[weight])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert len(num_fused) == 14
