"""SwiGLU's gate and its gradient on a GPU, in one kernel each. It is imported only where Triton works.

Where both layers have adapters, the kernels add what these make: `low` (T, 2 r), the gate's and that of `up`, times
`gate_b` and `up_b` (F, r). It is added in float32, to the products of the frozen weights alone.

Shapes: T tokens, F features, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK = 16, 128
"""Tokens and features of a tile."""


class Adapters(NamedTuple):
    """The adapters of both layers."""

    low: Tensor
    gate_b: Tensor
    up_b: Tensor


@triton.jit
def inputs(gate, up, low, gate_b, up_b, at, m, k, rows, columns, feature_stride, rank_stride, RANK: tl.constexpr):
    """A tile of the gate and of `up`, with their adapters, in float32; the strides are those of both B."""
    inside = rows[:, None] & columns[None, :]
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, RANK, 16):  # more ranks at once do not fit into registers in float32
        j = first + tl.arange(0, 16)
        narrow, wide = rows[:, None] & (j < RANK)[None, :], (j < RANK)[:, None] & columns[None, :]
        to, of = low + m[:, None] * 2 * RANK + j[None, :], k[None, :] * feature_stride + j[:, None] * rank_stride
        g += tl.dot(tl.load(to, mask=narrow, other=0.0), tl.load(gate_b + of, mask=wide, other=0.0),
                    input_precision="ieee")  # fmt: skip
        u += tl.dot(tl.load(to + RANK, mask=narrow, other=0.0), tl.load(up_b + of, mask=wide, other=0.0),
                    input_precision="ieee")  # fmt: skip
    return g, u


@triton.jit
def _gated(gate, up, low, gate_b, up_b, output, tokens, size, RANK: tl.constexpr, ROWS: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    m, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = m < tokens, k < size
    at = m.to(tl.int64)[:, None] * size + k[None, :]
    g, u = inputs(gate, up, low, gate_b, up_b, at, m, k, rows, columns, RANK, 1, RANK)
    y = g / (1 + tl.exp(-g)) * u
    tl.store(output + at, y.to(output.dtype.element_ty), mask=rows[:, None] & columns[None, :])


@triton.jit
def _gated_backward(grad, gate, up, low, gate_b, up_b, grad_gate, grad_up, tokens, size, RANK: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    m, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = m < tokens, k < size
    inside = rows[:, None] & columns[None, :]
    at = m.to(tl.int64)[:, None] * size + k[None, :]
    g, u = inputs(gate, up, low, gate_b, up_b, at, m, k, rows, columns, RANK, 1, RANK)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-g))
    tl.store(grad_gate + at, (d * u * share * (1 + g * (1 - share))).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (d * g * share).to(grad_up.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor, adapters: Adapters | None = None) -> Tensor:
    """`silu(gate) · up`, of one shape (T, F), contiguous."""
    output = gate.new_empty(gate.shape)
    _launch(_gated, (gate, up), adapters, (output,))
    return output


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, adapters: Adapters | None = None) -> tuple[Tensor, Tensor]:
    """The gradients by `gate` and `up`, where `grad` is that by the output."""
    grads = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch(_gated_backward, (grad, gate, up), adapters, grads)
    return grads


def _launch(kernel, inputs: tuple[Tensor, ...], adapters: Adapters | None, outputs: tuple[Tensor, ...]) -> None:
    tokens, size = inputs[0].shape
    rank = 0 if adapters is None else adapters.gate_b.shape[1]
    kernel[triton.cdiv(tokens, ROWS), triton.cdiv(size, BLOCK)](
        *inputs, *(adapters or 3 * inputs[:1]), *outputs, tokens, size, RANK=rank, ROWS=ROWS, BLOCK=BLOCK
    )
