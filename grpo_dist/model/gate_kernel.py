"""SwiGLU's gate and its gradient on a GPU, in one kernel each. It is imported only where Triton works."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _gated(gate, up, output, count, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < count
    g = tl.load(gate + k, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + k, (g / (1 + tl.exp(-g)) * u).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < count
    d = tl.load(grad + k, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + k, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + k, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-g))
    tl.store(grad_gate + k, (d * u * share * (1 + g * (1 - share))).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + k, (d * g * share).to(grad_up.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`, of one shape, contiguous."""
    output = torch.empty_like(gate)
    _gated[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, output, gate.numel(), BLOCK=BLOCK)
    return output


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by `gate` and `up`, where `grad` is that by the output."""
    grads = torch.empty_like(gate), torch.empty_like(up)
    _gated_backward[(triton.cdiv(gate.numel(), BLOCK),)](grad, gate, up, *grads, gate.numel(), BLOCK=BLOCK)
    return grads
