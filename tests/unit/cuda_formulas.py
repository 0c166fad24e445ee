"""Operations that CUDA has and the CPU does not, by their formulas; for the simulated device."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import flash_formulas
import torch
from torch import Tensor

aten = torch.ops.aten


def _flash(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, most_queries: int, most_keys: int,
    dropout: float, causal: bool, debug: bool, *, scale: float, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert dropout == 0 and not debug and query.dtype in HALVES
    rows = (each.float() for each in (query, key, value))
    call = _call(queries, keys, most_queries, most_keys, causal, window_size_left, window_size_right)
    output, sums, state = flash_formulas.forward(*rows, call, scale)
    return torch.empty_like(query).copy_(output), sums, *state, torch.zeros(0)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, queries: Tensor,
    keys: Tensor, most_queries: int, most_keys: int, dropout: float, causal: bool, *states: Tensor, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert dropout == 0 and query.dtype in HALVES
    likes = query, key, value
    grad, query, key, value, output = (each.float() for each in (grad, query, key, value, output))
    call = _call(queries, keys, most_queries, most_keys, causal, window_size_left, window_size_right)
    grads = flash_formulas.backward((grad, query), (output, sums), key, value, call, list(states), scale)
    return tuple(torch.empty_like(like).copy_(each) for like, each in zip(likes, grads, strict=True))


def _call(
    queries: Tensor, keys: Tensor, most_queries: int, most_keys: int, causal: bool, left: int | None, right: int | None
) -> Any:
    """The arguments as `shared_prefix.Call` has them, which cannot be imported before the device is there."""
    assert (left is None) == (right is None) and not right
    return types.SimpleNamespace(queries=queries, keys=keys, most_queries=most_queries, most_keys=most_keys,
                                 causal=causal, window=None if left is None else left + 1)  # fmt: skip


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    assert x.dtype in HALVES and dtype == torch.float32
    return torch.matmul(x.float(), y.float())


HALVES = (torch.bfloat16, torch.float16)
MORE_KERNELS = {aten._flash_attention_backward.default: 4}
"""Kernels of an operation beyond the first. Flash's backward: row sums, a cast, and two sums over grouped heads."""
KERNELS: dict[Any, Callable[..., Any]] = {
    aten._flash_attention_forward.default: _flash, aten._flash_attention_backward.default: _flash_backward,
    aten.bmm.dtype: _product, aten.mm.dtype: _product,
}  # fmt: skip
"""Operations that CUDA has and the CPU does not, by their formulas."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` by its formula."""
    if enable_gqa:
        repeat = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
    scores = (query @ key.transpose(-2, -1)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.dropout(torch.softmax(scores, -1).to(value.dtype), dropout_p, dropout_p > 0) @ value
