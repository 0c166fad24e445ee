"""Products have the numbers of their definition, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grpo_dist.distributed import device
from grpo_dist.model import products
from grpo_dist.model.fused_modules import fuse_linears, plain_modules
from grpo_dist.model.products import FEWEST_NUMBERS, summed_over_rows, weighted

HAS_ONEDNN = torch.backends.mkldnn.is_available()
SHAPES = [(1, 128, 512), (37, 512, 128), (300, 4096, 16), (300, 16, 4096), (5, 8, 8)]
"""Rows, inputs and outputs; of the last ones a matrix has fewer numbers than oneDNN is asked for."""


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not HAS_ONEDNN, reason="no oneDNN"))])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each library in turn."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    return request.param


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_with_a_weight(rows: int, inputs: int, outputs: int, has_bias: bool) -> None:
    x, weight, bias = drawn(rows, inputs), drawn(outputs, inputs), drawn(outputs) if has_bias else None
    truth = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(weighted(x, weight, bias).double(), truth, atol=1e-4, rtol=1e-5)
    turned = weighted(x, weight.T.contiguous().T, bias)  # as a gradient has it
    torch.testing.assert_close(turned.double(), truth, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize(("rows", "left", "right"), SHAPES)
def test_a_sum_over_rows(rows: int, left: int, right: int) -> None:
    x, y = drawn(rows, left), drawn(rows, right)
    got = summed_over_rows(x, y)
    assert got.is_contiguous(), "DDP copies gradients that lie otherwise"
    torch.testing.assert_close(got.double(), x.double().T @ y.double(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_numbers_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    x, weight = drawn(3, 256).to(dtype), drawn(256, 256).to(dtype)
    assert torch.equal(weighted(x, weight), nn.functional.linear(x, weight))


@pytest.mark.parametrize(("platform", "capability"), [("win32", "AVX512"), ("darwin", "AVX512"), ("linux", "AVX2")])
def test_other_systems_and_processors_keep_torchs_library(
    platform: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.sys, "platform", platform)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not device.onednn_is_faster.__wrapped__()


@pytest.mark.skipif(not HAS_ONEDNN, reason="no oneDNN")
def test_no_row_depends_on_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    x, weight = drawn(700, 256), drawn(256, 256)
    whole = weighted(x, weight)
    for rows in (slice(0, 1), slice(3, 20), slice(100, 611)):
        torch.testing.assert_close(weighted(x[rows], weight), whole[rows], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_fused_layer_and_its_gradients(by_onednn: bool, has_bias: bool, is_frozen: bool) -> None:
    layer = nn.Linear(512, 128, bias=has_bias)
    assert layer.weight.numel() >= FEWEST_NUMBERS
    layer.weight.requires_grad_(not is_frozen)
    x = drawn(2, 19, 512).requires_grad_()
    leaves = [leaf for leaf in (x, *layer.parameters()) if leaf.requires_grad]
    fuse_linears(nn.ModuleList([layer]))
    grad = drawn(2, 19, 128)
    got = layer(x)
    assert (type(got.grad_fn).__name__ == "_LinearBackward") == by_onednn
    with plain_modules():
        truth = layer(x)
    torch.testing.assert_close(got, truth)
    for value, expected in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(truth, leaves, grad),
                               strict=True):  # fmt: skip
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-5)


def test_autocast_decides_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    layer = nn.Linear(512, 128)
    fuse_linears(nn.ModuleList([layer]))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(drawn(3, 512)).dtype == torch.bfloat16
