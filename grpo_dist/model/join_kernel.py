"""The join of two parts of attention on a GPU, in one kernel. It is imported only where Triton works.

torch's operations need nine passes over outputs or sums.

Shapes: T tokens, H heads, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


@triton.jit
def _join(output, sums, other, other_sums, tokens, heads, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = row < tokens
    at = head.to(tl.int64) * tokens + row
    x = tl.load(sums + at, mask=inside, other=0.0)
    y = tl.load(other_sums + at, mask=inside, other=0.0)
    y = tl.where(tl.abs(y) == float("inf"), -float("inf"), y)
    peak = tl.maximum(x, y)
    own, shared = tl.exp(x - peak), tl.exp(y - peak)
    total = own + shared
    tl.store(sums + at, peak + tl.log(total), mask=inside)
    places = (row.to(tl.int64) * heads + head)[:, None] * size + d[None, :]
    both = inside[:, None] & (d < size)[None, :]
    a = tl.load(output + places, mask=both, other=0.0).to(tl.float32)
    b = tl.load(other + places, mask=both, other=0.0).to(tl.float32)
    joined = a * (own / total)[:, None] + b * (shared / total)[:, None]
    tl.store(output + places, joined.to(output.dtype.element_ty), mask=both)


def join(output: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> tuple[Tensor, Tensor]:
    """`shared_prefix._joined`, in place: outputs (T, H, D) and log-sums (H, T) float32, contiguous, of two parts."""
    tokens, heads, size = output.shape
    grid = (triton.cdiv(tokens, ROWS), heads)
    _join[grid](output, sums, other, other_sums, tokens, heads, size, ROWS=ROWS, BLOCK=triton.next_power_of_2(size))
    return output, sums
