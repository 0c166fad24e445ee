"""Attention of a row of pieces on a GPU: two variable-length flash calls, joined under one softmax. Pure.

A piece is a prompt and its completions. One call computes causal attention within every segment of the row (a prompt or
a completion). The other call computes attention of the completions to the keys of their prompt. Their outputs are
weighted by their sums of exponentials (FlashAttention, arXiv:2205.14135, section 3.1). No mask exists. Keys and values
are not expanded to the query heads, and only those of prompts are copied. Lengths are arbitrary.

In the backward pass both kernels get the joined output and the joined log-sum-exp. The probabilities and row sums that
they recompute are then those of the joint softmax (arXiv:2307.08691, section 3.1.2), and their gradients add up.

Shapes: T tokens in the row, Hq query heads, Hk key heads, D head size, K tokens of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed.transfer import to_device

LARGEST_HEAD = 256
"""The largest head size of the flash kernels. A size must be a multiple of 8."""


@dataclass(frozen=True)
class Segments:
    """Bounds of the segments of a row, for both calls; int32 tensors on the device of the row."""

    own: Tensor
    """Bounds of all segments, one after another: (number of segments + 1,)."""
    queries: Tensor
    """Bounds of prompt, all its completions, next prompt, …: (2 · pieces + 1,)."""
    keys: Tensor
    """Bounds of the prompt keys that each of those ranges sees, none for a prompt: (2 · pieces + 1,)."""
    prompt_rows: Tensor
    """(K,) int64 places of the prompts' tokens in the row."""
    most_own: int
    """Tokens of the longest segment."""
    most_queries: int
    """Tokens of the longest range of queries, prompts included. The kernel writes only these."""
    most_keys: int
    """Tokens of the longest prompt with completions."""

    def to(self, device: torch.device) -> Segments:
        """The same on `device`."""
        if device.type == self.own.device.type:
            return self
        own, queries, keys, rows = to_device([self.own, self.queries, self.keys, self.prompt_rows.int()], device)
        return Segments(own, queries, keys, rows.long(), self.most_own, self.most_queries, self.most_keys)


def segments(pieces: Sequence[tuple[int, list[int]]]) -> Segments:
    """The segments of a row of pieces, each (prompt length, completion lengths), on the CPU."""
    lengths = [length for prompt, completions in pieces for length in (prompt, *completions)]
    queries = [length for prompt, completions in pieces for length in (prompt, sum(completions))]
    keys = [length for prompt, completions in pieces for length in (0, prompt if completions else 0)]
    rows, start = [], 0
    for prompt, completions in pieces:
        if completions:
            rows.append(torch.arange(start, start + prompt))
        start += prompt + sum(completions)
    return Segments(
        _bounds(lengths), _bounds(queries), _bounds(keys),
        torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64),
        max(lengths), max(queries), max(keys),
    )  # fmt: skip


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def can_use_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the flash kernels support these heads: half precision on a GPU, equal sizes, multiples of 8 up to 256."""
    size = query.shape[-1]
    return (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0
            and size <= LARGEST_HEAD and key.shape[-1] == value.shape[-1] == size)  # fmt: skip


def shared_prefix_attention(query: Tensor, key: Tensor, value: Tensor, where: Segments, scale: float | None) -> Tensor:
    """Attention of a row: `query` (T, Hq, D), `key` and `value` (T, Hk, D) to (T, Hq, D); differentiable."""
    return _SharedPrefix.apply(query, key, value, where, query.shape[-1] ** -0.5 if scale is None else scale)


class _SharedPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, where: Segments, scale: float) -> Tensor:
        output, sums, state = _flash(
            query, key, value, where.own, where.own, where.most_own, where.most_own, True, scale
        )
        prefix_state = state
        if where.most_keys:
            prompts = key[where.prompt_rows], value[where.prompt_rows]
            other, other_sums, prefix_state = _flash(
                query, *prompts, where.queries, where.keys, where.most_queries, where.most_keys, False, scale
            )
            output, sums = _joined(output, sums, other, other_sums)
        ctx.save_for_backward(query, key, value, output, sums, *state, *prefix_state)
        ctx.where, ctx.scale = where, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums, *states = ctx.saved_tensors
        where, grad = ctx.where, grad.contiguous()
        shared = (grad, query), (output, sums)
        grad_query, grad_key, grad_value = _flash_backward(
            *shared, key, value, where.own, where.own, where.most_own, where.most_own, True, states[:2], ctx.scale
        )
        if where.most_keys:
            rows = where.prompt_rows
            more_query, more_key, more_value = _flash_backward(
                *shared, key[rows], value[rows], where.queries, where.keys, where.most_queries, where.most_keys, False,
                states[2:], ctx.scale,
            )  # fmt: skip
            grad_query = grad_query.add_(more_query)
            grad_key, grad_value = grad_key.index_add_(0, rows, more_key), grad_value.index_add_(0, rows, more_value)
        return grad_query, grad_key, grad_value, None, None


def _joined(one: Tensor, one_sums: Tensor, other: Tensor, other_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Join two outputs (T, H, D) and their log-sums (H, T). A query without keys in `other` has an output of 0 there
    and an infinite sum whose sign depends on the kernel."""
    other_sums = torch.where(other_sums.isinf(), -torch.inf, other_sums)
    share = torch.sigmoid(other_sums - one_sums).T[..., None]
    joined = torch.lerp(one.to(share.dtype), other.to(share.dtype), share).to(one.dtype)
    return joined, torch.logaddexp(one_sums, other_sums)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, most_queries: int, most_keys: int,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """The output (T, H, D), its log-sums of exponentials (H, T), and random states for the backward pass, unused
    without dropout."""
    output, sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, queries, keys, most_queries, most_keys, 0.0, causal, False, scale=scale
    )
    return output, sums, (state, unused)


def _flash_backward(
    rows: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor], key: Tensor, value: Tensor, queries: Tensor,
    keys: Tensor, most_queries: int, most_keys: int, causal: bool, state: Sequence[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.aten._flash_attention_backward(
        *rows, key, value, *result, queries, keys, most_queries, most_keys, 0.0, causal, *state, scale=scale
    )
