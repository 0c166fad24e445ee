"""Attention of a row of pieces on a GPU: two variable-length flash calls, joined under one softmax. Pure.

A piece is a prompt and its completions. One call computes causal attention within every segment of the row (a prompt or
a completion). The other call computes attention of the completions to the keys of their prompt. Their outputs are
weighted by their sums of exponentials (FlashAttention, arXiv:2205.14135, section 3.1). No mask exists. Keys and values
are not expanded to the query heads, and only those of prompts are copied. Lengths are arbitrary.

In the backward pass both kernels get the joined output and the joined log-sum-exp. The probabilities and row sums that
they recompute are then those of the joint softmax (arXiv:2307.08691, section 3.1.2), and their gradients add up.

An attention sink is one more logit of a head in that softmax, without a value. It scales the output and joins the
log-sum-exp, so the kernels' backward pass needs no other change.

A layer with a sliding window sees only the end of a long prompt, and not the same part from every query. There each
completion gets copies of the last keys and values of its prompt, and one call computes all.

Shapes: T tokens in the row, Hq query heads, Hk key heads, D head size, K tokens of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed.transfer import to_device
from .layout import AttentionOptions, Pieces
from .triton_trial import triton_obstacle


@dataclass(frozen=True)
class Call:
    """What a call of the kernels computes: sequences of queries and of keys, and which of these a query sees."""

    queries: Tensor
    """Bounds of the queries of each sequence, one after another: int32."""
    keys: Tensor
    """The same of the keys."""
    most_queries: int
    most_keys: int
    causal: bool
    """The last query of a sequence sees its last key, and each query before it one key less; else it sees all."""
    window: int | None = None
    """Most keys that a query sees."""


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

    @property
    def within(self) -> Call:
        """Every segment by itself."""
        return Call(self.own, self.own, self.most_own, self.most_own, causal=True)

    @property
    def before(self) -> Call:
        """The completions after their prompts' keys."""
        return Call(self.queries, self.keys, self.most_queries, self.most_keys, causal=False)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [self.own, self.queries, self.keys, self.prompt_rows]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Segments:
        """The same numbers with these in place of `tensors`."""
        own, queries, keys, prompt_rows = tensors
        return replace(self, own=own, queries=queries, keys=keys, prompt_rows=prompt_rows)

    def to(self, device: torch.device) -> Segments:
        """The same on `device`."""
        return self.with_tensors(to_device(self.tensors, device))


@dataclass(frozen=True)
class Window:
    """The one call of a layer with a sliding window; tensors on one device."""

    call: Call
    """A segment's last keys are its own. Those before them are the end of its prompt."""
    rows: Tensor
    """(K,) int64 places in the row of the keys."""

    def to(self, device: torch.device) -> Window:
        """The same on `device`."""
        queries, keys, rows = to_device([self.call.queries, self.call.keys, self.rows], device)
        return Window(replace(self.call, queries=queries, keys=keys), rows)


def window_of(pieces: Pieces, size: int) -> Window:
    """The segments of a row of pieces, each (prompt length, completion lengths), for a window of `size` positions, on
    the CPU."""
    lengths: list[tuple[int, int]] = []  # of queries and keys
    rows: list[Tensor] = []
    start = 0
    for prompt, completions in pieces:
        end = start + prompt
        # the first token of a completion sees `size - 1` tokens of the prompt
        tail = torch.arange(max(start, end - size + 1), end)
        lengths.append((prompt, prompt))
        rows.append(torch.arange(start, end))
        for length in completions:
            lengths.append((length, len(tail) + length))
            rows += [tail, torch.arange(end, end + length)]
            end += length
        start = end
    queries, keys = (list(each) for each in zip(*lengths, strict=True))
    call = Call(_bounds(queries), _bounds(keys), max(queries), max(keys), causal=True, window=size)
    return Window(call, torch.cat(rows))


def segments(pieces: Pieces) -> Segments:
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


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, where: Segments, options: AttentionOptions
) -> Tensor:
    """Attention of a row: `query` (T, Hq, D), `key` and `value` (T, Hk, D) to (T, Hq, D); differentiable."""
    return _SharedPrefix.apply(query, key, value, options.sinks, where, options.scale_of(query))


class _SharedPrefix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, where: Segments, scale: float
    ) -> Tensor:
        output, sums, state = _flash(query, key, value, where.within, scale)
        prefix_state = state
        if where.most_keys:
            prompts = _chosen(key, value, where.prompt_rows)
            other, other_sums, prefix_state = _flash(query, *prompts, where.before, scale)
            output, sums = _joined(output, sums, other, other_sums)
        output, sums = _scaled(output, sums, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, sums, *state, *prefix_state)
        ctx.where, ctx.scale = where, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, sums, *states = ctx.saved_tensors
        where, rows, result = ctx.where, (grad.contiguous(), query), (output, sums)
        grads = _flash_backward(rows, result, key, value, where.within, states[:2], ctx.scale)
        if where.most_keys:
            prompts = _chosen(key, value, where.prompt_rows)
            more = _flash_backward(rows, result, *prompts, where.before, states[2:], ctx.scale)
            grads[0].add_(more[0])
            for whole, part in zip(grads[1:], more[1:], strict=True):
                whole.index_add_(0, where.prompt_rows, part)
        return *grads, _of_sinks(ctx, rows[0], output, sums, sinks), None, None


def window_attention(query: Tensor, key: Tensor, value: Tensor, where: Window, options: AttentionOptions) -> Tensor:
    """The same in a layer with a sliding window, that of `where`."""
    return _Window.apply(query, key, value, options.sinks, where, options.scale_of(query))


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, where: Window, scale: float
    ) -> Tensor:
        seen = _chosen(key, value, where.rows)
        output, sums, state = _flash(query, *seen, where.call, scale)
        output, sums = _scaled(output, sums, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, sums, *state)
        ctx.where, ctx.scale = where, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, sums, *state = ctx.saved_tensors
        rows, grad = ctx.where.rows, grad.contiguous()
        seen = _chosen(key, value, rows)
        grad_query, *grads = _flash_backward((grad, query), (output, sums), *seen, ctx.where.call, state, ctx.scale)
        # in float32: a prompt's keys have a part of their gradient from each completion
        dtype = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = (torch.zeros_like(key, dtype=dtype).index_add_(0, rows, part.to(dtype)).to(key.dtype)
                                for part in grads)  # fmt: skip
        return grad_query, grad_key, grad_value, _of_sinks(ctx, grad, output, sums, sinks), None, None


def _chosen(key: Tensor, value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return key.index_select(0, rows), value.index_select(0, rows)


def _joined(one: Tensor, one_sums: Tensor, other: Tensor, other_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Join two outputs (T, H, D) and their log-sums (H, T), in place if Triton works. A query without keys in `other`
    has an output of 0 there and an infinite sum whose sign depends on the kernel."""
    if one.is_cuda and one.is_contiguous() and other.is_contiguous() and triton_obstacle() is None:
        from .join_kernel import join

        return join(one, one_sums, other, other_sums)
    other_sums = torch.where(other_sums.isinf(), -torch.inf, other_sums)
    share = torch.sigmoid(other_sums - one_sums).T[..., None]
    joined = torch.lerp(one.to(share.dtype), other.to(share.dtype), share).to(one.dtype)
    return joined, torch.logaddexp(one_sums, other_sums)


def with_sinks(sums: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of outputs when sinks have joined their softmax, and the log-sums of both; all of the shape of
    `sums`, the log-sums without sinks."""
    sinks = sinks.to(sums.dtype)
    return torch.sigmoid(sums - sinks), torch.logaddexp(sums, sinks)


def _scaled(output: Tensor, sums: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """An output (T, H, D) and its log-sums (H, T) with the sinks (H,)."""
    if sinks is None:
        return output, sums
    share, sums = with_sinks(sums, sinks[:, None])
    return (output * share.T[..., None]).to(output.dtype), sums


def _of_sinks(ctx: Any, grad: Tensor, output: Tensor, sums: Tensor, sinks: Tensor | None) -> Tensor | None:
    """The gradient of the sinks (H,): as of any logit, with a value of 0."""
    if sinks is None or not ctx.needs_input_grad[3]:
        return None
    probs = torch.exp(sinks.to(sums.dtype)[:, None] - sums)
    products = (grad.to(sums.dtype) * output).sum(-1)
    return -torch.einsum("ht,th->h", probs, products).to(sinks.dtype)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The output (T, H, D), its log-sums of exponentials (H, T), and random states for the backward pass, unused
    without dropout."""
    output, sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, call.queries, call.keys, call.most_queries, call.most_keys, 0.0, call.causal, False,
        scale=scale, **_sides(call),
    )  # fmt: skip
    return output, sums, (state, unused)


def _flash_backward(
    rows: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor], key: Tensor, value: Tensor, call: Call,
    state: Sequence[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.aten._flash_attention_backward(
        *rows, key, value, *result, call.queries, call.keys, call.most_queries, call.most_keys, 0.0, call.causal,
        *state, scale=scale, **_sides(call),
    )  # fmt: skip


def _sides(call: Call) -> dict[str, int]:
    """A window as the kernels take it: positions on both sides of a query."""
    return {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}
