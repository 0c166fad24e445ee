"""The fused head against autograd through a plain log-softmax in float64, and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_dist.model import logprobs as module
from grpo_dist.model.logprobs import head_logprobs, logits_logprobs

pytestmark = pytest.mark.quick

M, H, V = 7, 5, 11


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The twin: whole logits in float64, everything left to autograd."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    rows = torch.log_softmax(logits / temperature, -1)
    picked = torch.stack([rows[m, int(target)] for m, target in enumerate(targets)]) if len(targets) else rows.sum(-1)
    return picked, -(rows.exp() * rows).sum(-1)


def inputs(dtype: torch.dtype = torch.float32, with_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, head, bias and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(M, H, generator=generator), torch.randn(V, H, generator=generator)
    bias = torch.randn(V, generator=generator).to(dtype) if with_bias else None
    return hidden.to(dtype), weight.to(dtype), bias, torch.randint(V, (M,), generator=generator)


def gradients(function: object, tensors: list[Tensor | None], targets: Tensor, temperature: float,
              chosen: list[int]) -> list[Tensor]:  # fmt: skip
    """Gradients with respect to the `chosen` ones of hidden, weight, bias, for one fixed incoming gradient."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(n in chosen) for n, t in enumerate(tensors)]
    values, _ = function(*leaves, targets, temperature)  # type: ignore[operator]
    incoming = torch.linspace(-1, 2, len(values)).to(values.dtype)
    return list(torch.autograd.grad(values, [leaves[n] for n in chosen], incoming))  # type: ignore[misc]


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows scored in C++, where there is a compiler, and by torch, as elsewhere."""
    if not request.param:
        monkeypatch.setattr(module.pack_kernels, "fits", lambda *_, **__: False)


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("chunk_elements", [1, 3 * V, 1 << 24])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_autograd(
    chunk_elements: int, with_bias: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk_elements)
    hidden, weight, bias, targets = inputs(with_bias=with_bias)
    values, entropies = head_logprobs(hidden, weight, bias, targets, temperature)
    expected, expected_entropies = plain(hidden, weight, bias, targets, temperature)
    assert values.dtype == entropies.dtype == torch.float32
    assert torch.allclose(values.double(), expected, atol=1e-5)
    assert torch.allclose(entropies.double(), expected_entropies, atol=1e-5)
    choices = [[0], [0, 1], [1]] + ([[0, 1, 2], [1, 2]] if with_bias else [])
    for chosen in choices:
        got = gradients(head_logprobs, [hidden, weight, bias], targets, temperature, chosen)
        truth = gradients(plain, [hidden, weight, bias], targets, temperature, chosen)
        for value, expected_value in zip(got, truth, strict=True):
            assert value.dtype == torch.float32
            assert torch.allclose(value, expected_value, atol=1e-5), chosen


@pytest.mark.parametrize(("chunk_elements", "rows"), [(1, [1] * M), (2 * V, [2, 2, 2, 1]), (M * V, [M])])
def test_no_more_logits_than_a_chunk(chunk_elements: int, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    weighted = module.weighted
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk_elements)
    monkeypatch.setattr(module, "weighted", lambda *inputs: seen.append(weighted(*inputs)) or seen[-1])
    hidden, weight, bias, targets = inputs()
    values, _ = head_logprobs(hidden, weight.requires_grad_(), bias, targets, 1.0)
    values.sum().backward()
    assert [len(logits) for logits in seen] == rows + rows, "forward, and again where the head is trained"


@pytest.mark.parametrize("chosen", [[2], [0, 2]])
def test_a_bias_trained_without_its_weight_has_a_gradient(chosen: list[int]) -> None:
    hidden, weight, bias, targets = inputs()
    got = gradients(head_logprobs, [hidden, weight, bias], targets, 0.8, chosen)
    truth = gradients(plain, [hidden, weight, bias], targets, 0.8, chosen)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, truth, strict=True))


@pytest.mark.parametrize("chunk_elements", [V, 1 << 24])
@pytest.mark.parametrize("chosen", [[0], [0, 1], [0, 1, 2], [1]])
def test_the_entropy_gradient_equals_autograd(
    chosen: list[int], chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk_elements)
    tensors = inputs()
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().clone().to(dtype).requires_grad_(n in chosen) for n, t in enumerate(tensors[:3])]
        if dtype == torch.float32:
            values, entropies = head_logprobs(*leaves, tensors[3], 0.7, entropy_gradient=True)
        else:
            values, entropies = plain(*leaves, tensors[3], 0.7)
        mixed = (values * torch.linspace(-1, 2, M)).sum() + (entropies * torch.linspace(3, -2, M)).sum()
        results.append(torch.autograd.grad(mixed, [leaves[n] for n in chosen]))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got.double(), expected, atol=2e-5)


def test_the_frozen_heads_entropy_costs_one_more_vector_a_token() -> None:
    hidden, weight, bias, targets = inputs()
    _, entropies = head_logprobs(hidden.requires_grad_(), weight, bias, targets, 1.0, entropy_gradient=True)
    assert [tuple(t.shape) for t in entropies.grad_fn.saved_tensors] == [(M, H), (M, H)]


@pytest.mark.parametrize("head_is_frozen", [True, False])
def test_gradients_equal_finite_differences(head_is_frozen: bool) -> None:
    hidden, weight, bias, targets = inputs()
    incoming = torch.linspace(-1, 2, M).double()

    def value(h: Tensor, w: Tensor, b: Tensor | None) -> float:
        return float((plain(h, w, b, targets, 0.7)[0] * incoming).sum())

    chosen = [0] if head_is_frozen else [0, 1, 2]
    got = gradients(head_logprobs, [hidden, weight, bias], targets, 0.7, chosen)
    doubles = [hidden.double(), weight.double(), bias.double() if bias is not None else None]
    for n, gradient in zip(chosen, got, strict=True):
        for place in range(0, gradient.numel(), 3):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [t.clone() if t is not None else None for t in doubles]
                moved[n].view(-1)[place] += step  # type: ignore[union-attr]
                ends.append(value(*moved))  # type: ignore[arg-type]
            assert float(gradient.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-5)


def test_entropies_carry_no_gradient() -> None:
    hidden, weight, bias, targets = inputs()
    _, entropies = head_logprobs(hidden.requires_grad_(), weight, bias, targets, 1.0)
    assert not entropies.requires_grad
    uniform, entropy = head_logprobs(torch.zeros(2, H), weight, None, targets[:2], 1.0)
    assert entropy.tolist() == pytest.approx([float(torch.tensor(V).log())] * 2, rel=1e-6)
    assert uniform.tolist() == pytest.approx([-float(torch.tensor(V).log())] * 2, rel=1e-6)


def test_the_frozen_head_saves_one_vector_a_token() -> None:
    """Nothing the size of the vocabulary may wait for the backward pass."""
    hidden, weight, bias, targets = inputs()
    values, _ = head_logprobs(hidden.requires_grad_(), weight, bias, targets, 1.0)
    assert [tuple(t.shape) for t in values.grad_fn.saved_tensors] == [(M, H)]


def test_without_gradients_nothing_is_saved() -> None:
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        values, _ = head_logprobs(hidden.requires_grad_(), weight.requires_grad_(), bias, targets, 1.0)
    assert not values.requires_grad


@pytest.mark.parametrize("chosen", [[0], [0, 1]])
def test_no_tokens_give_a_gradient_of_zero(chosen: list[int]) -> None:
    hidden, weight, _, targets = inputs()
    got = gradients(head_logprobs, [hidden[:0], weight, None], targets[:0], 1.0, chosen)
    assert all(bool((g == 0).all()) for g in got)


@pytest.mark.parametrize("chosen", [[0], [0, 1, 2]])
def test_bfloat16_is_close_and_keeps_its_dtype(chosen: list[int]) -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    values, entropies = head_logprobs(hidden, weight, bias, targets, 0.9)
    expected, expected_entropies = plain(hidden, weight, bias, targets, 0.9)
    assert values.dtype == entropies.dtype == torch.float32
    assert torch.allclose(values.double(), expected, rtol=0, atol=0.03)
    assert torch.allclose(entropies.double(), expected_entropies, rtol=0, atol=0.02)
    got = gradients(head_logprobs, [hidden, weight, bias], targets, 0.9, chosen)
    truth = gradients(plain, [hidden, weight, bias], targets, 0.9, chosen)
    for value, expected_value in zip(got, truth, strict=True):
        assert value.dtype == torch.bfloat16
        assert float((value - expected_value).norm() / expected_value.norm()) < 0.03


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_whole_logits_give_the_same(temperature: float) -> None:
    hidden, weight, bias, targets = inputs()
    logits = torch.nn.functional.linear(hidden, weight, bias).requires_grad_()
    values, entropies = logits_logprobs(logits, targets, temperature)
    expected, expected_entropies = head_logprobs(hidden, weight, bias, targets, temperature)
    assert torch.allclose(values, expected, atol=1e-6) and torch.allclose(entropies, expected_entropies, atol=1e-6)
    assert values.requires_grad and not entropies.requires_grad
    assert logits_logprobs(logits, targets, temperature, entropy_gradient=True)[1].requires_grad
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    with torch.no_grad():
        assert torch.equal(logits_logprobs(logits, targets, temperature)[0], values)
    assert torch.equal(logits, torch.nn.functional.linear(hidden, weight, bias)), "they are the caller's"
    slope = (torch.nn.functional.one_hot(targets, V) - torch.softmax(logits / temperature, -1)) / temperature
    assert torch.allclose(gradient, slope, atol=1e-6)
