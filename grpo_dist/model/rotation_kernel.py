"""Rotary positions of queries and keys on a GPU, in one kernel. It is imported only where Triton works.

torch's operations need 13 passes over them, and as many in the backward pass.

Shapes: T tokens, H heads, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 8


@triton.jit
def _turn(x, output, row, inside, d, lower_cos, upper_cos, lower_sin, upper_sin, HEADS: tl.constexpr,
          HALF: tl.constexpr):  # fmt: skip
    """All heads of some rows."""
    for head in range(HEADS):
        at = (row.to(tl.int64) * HEADS + head)[:, None] * (2 * HALF) + d[None, :]
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + at, (a * lower_cos - b * lower_sin).to(output.dtype.element_ty), mask=inside)
        tl.store(output + at + HALF, (b * upper_cos + a * upper_sin).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(query, key, cos, sin, query_output, key_output, tokens, HQ: tl.constexpr, HK: tl.constexpr,
            HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < tokens)[:, None] & (d < HALF)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * HALF) + d[None, :]
    lower_cos = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    upper_cos = tl.load(cos + at + HALF, mask=inside, other=0.0).to(tl.float32)
    lower_sin = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    upper_sin = tl.load(sin + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACK:  # the transposed matrix
        lower_sin, upper_sin = -upper_sin, -lower_sin
    _turn(query, query_output, row, inside, d, lower_cos, upper_cos, lower_sin, upper_sin, HQ, HALF)
    _turn(key, key_output, row, inside, d, lower_cos, upper_cos, lower_sin, upper_sin, HK, HALF)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """`x · cos + rotate_half(x) · sin` (arXiv:2104.09864, equation 34) of queries (T, Hq, D) and keys (T, Hk, D), for
    `cos` and `sin` (T, D), all contiguous; with `back`, the gradients by them for those by the results."""
    tokens, heads, size = query.shape
    outputs = query.new_empty(query.shape), key.new_empty(key.shape)
    _rotate[(triton.cdiv(tokens, ROWS),)](
        query, key, cos, sin, *outputs, tokens, HQ=heads, HK=key.shape[1], HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2), ROWS=ROWS, BACK=back,
    )  # fmt: skip
    return outputs
