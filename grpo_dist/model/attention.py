"""Attention for rows of several sequences behind shared prompts, through transformers' attention interface. Pure.

A model that is loaded with `attn_implementation=NAME` calls this module with queries, keys, values and the keyword
argument `layout`, which its caller passes to `forward`. The layout defines which tokens attend to which, and computes
only those pairs. No mask covers the row, only small blocks are masked, and the model's code is unchanged.

Shapes: T tokens in the row, Hq query heads, Hk key heads, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from . import pack_kernels
from .block_attention import BLOCK, GPU_BLOCK, BlockLayout, block_layout
from .flash_trial import can_use_flash, say_blocks
from .layout import AttentionOptions, Layout, Pieces
from .pack_kernels import Sequences
from .shared_prefix import Segments, Window, segments, shared_prefix_attention, window_attention, window_of

NAME = "grpo_dist"
"""The name of this attention in transformers."""


class PackLayout(Layout, Protocol):
    """The layout of a pack."""

    @property
    def pieces(self) -> Pieces:
        """Of the whole row: prompt length, completion lengths."""

    def to(self, device: torch.device, segments: Segments | None = None) -> PackLayout:
        """The layout with its tensors on `device`, where `segments` of the whole row may be already."""


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, *, layout: Layout | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **unused: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function that transformers calls. It ignores dropout, because a rollout and its update must agree."""
    if layout is None:
        raise ValueError(f"a model with attn_implementation={NAME!r} was called without the keyword argument `layout`")
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    return layout.attend(module.layer_idx, query, key, value, options), None


AttentionInterface.register(NAME, _attention)


class RowLayout:
    """A row of pieces, each (prompt length, completion lengths), on any device.

    In half precision on a GPU the flash kernels compute it (`shared_prefix.py`), and in float32 on a CPU those of
    `pack.cpp`. Otherwise blocks of masked attention do, which are made at their first use.
    """

    def __init__(self, pieces: Pieces, device: torch.device | None = None, segments: Segments | None = None) -> None:
        """`segments` are those of the pieces on `device`, if they are there already."""
        self.pieces, self.device = pieces, device or torch.device("cpu")
        self.longest = max(prompt + max(completions, default=0) for prompt, completions in pieces)
        self.tokens = sum(prompt + sum(completions) for prompt, completions in pieces)
        self._segments = segments
        self._windows: dict[int, Window] = {}
        self._blocks: dict[int | None, BlockLayout] = {}
        self._sequences: Sequences | None = None

    def to(self, device: torch.device, segments: Segments | None = None) -> RowLayout:
        """See `PackLayout`."""
        return RowLayout(self.pieces, device, segments)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Layout`."""
        window = options.window_in(self.longest)
        if options.softcap is not None and query.is_cuda:
            say_blocks("they have no soft cap of scores")
        on_cpu = _fits_kernels(query, key, value, options)
        if not on_cpu and (options.softcap is not None or not can_use_flash(query, key, value)):
            return self._in_blocks(window).attend(layer, query, key, value, options)
        scale = options.scale_of(query)
        # not indexed: the gradient of an index is a tensor of zeros to copy to
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if on_cpu:
            query, key, value = (x.contiguous() for x in (query, key, value))
            return _OnCpu.apply(query, key, value, self.sequences(), scale, window)[None]
        if window is None:
            return shared_prefix_attention(query, key, value, self._in_segments(), options)[None]
        return window_attention(query, key, value, self._in_window(window), options)[None]

    def sequences(self) -> Sequences:
        """Those of the row, as `pack.cpp` takes them."""
        if self._sequences is None:
            self._sequences = Sequences.of(self.pieces)
        return self._sequences

    def _in_segments(self) -> Segments:
        if self._segments is None:
            self._segments = segments(self.pieces).to(self.device)
        return self._segments

    def _in_window(self, window: int) -> Window:
        if window not in self._windows:
            self._windows[window] = window_of(self.pieces, window).to(self.device)
        return self._windows[window]

    def _in_blocks(self, window: int | None) -> BlockLayout:
        if window not in self._blocks:
            block = GPU_BLOCK if self.device.type == "cuda" else BLOCK
            self._blocks[window] = block_layout(self.pieces, block, window).to(self.device)
        return self._blocks[window]


def _fits_kernels(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> bool:
    """Whether the kernels for CPUs compute these heads (1, H, T, D)."""
    is_plain = options.softcap is None and options.sinks is None and key.shape == value.shape
    return is_plain and pack_kernels.fits(query, key, value)


class _OnCpu(torch.autograd.Function):
    """Queries (T, Hq, D), keys and values (T, Hk, D) to (T, Hq, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Tensor:
        output, lse = pack_kernels.attend(query, key, value, *how)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.how = how
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grads = pack_kernels.attend_backward(grad.contiguous(), query, key, value, output, lse, *ctx.how)
        return *grads, None, None, None
