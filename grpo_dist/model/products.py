"""Matrix products by the library that keeps most digits, or is the fastest here. Pure."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..distributed.device import onednn_is_faster

FEWEST_NUMBERS = 1 << 16
"""Numbers of a matrix from which on oneDNN's products are worth their start: it makes a kernel for each new number of
rows, which takes 0.7 ms. The number of rows has no part in the choice."""


def float32_product(x: Tensor, y: Tensor) -> Tensor:
    """`x y` (M, N) in float32, for x (M, K) and y (K, N) of one dtype. On a GPU, the result is not rounded to 16 bits
    first: a logit of 20 would be off by up to 0.06, and a sum of gradients by as much as each of its terms."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return (x @ y).float()


def weighted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias` (M, N), x (M, K) and W (N, K) of one dtype. Outside of autograd."""
    if not by_onednn(x, weight.numel()):
        return linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def summed_over_rows(x: Tensor, y: Tensor) -> Tensor:
    """`xᵀ y` (M, N), the gradient of a matrix that has `x` (T, M) on one side and `y` (T, N) on the other, both of one
    dtype; in float32. Outside of autograd."""
    if not by_onednn(x, x.shape[1] * y.shape[1]):
        return float32_product(x.T, y)
    if x.shape[1] > y.shape[1]:  # it is slow where the result is narrow
        return weighted(y.T, x.T).T.contiguous()
    return weighted(x.T, y.T)


def by_onednn(x: Tensor, numbers: int) -> bool:
    """Whether oneDNN multiplies `x` with a matrix of so many numbers."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and numbers >= FEWEST_NUMBERS
    return fits and onednn_is_faster()
