"""Attention for rows of several sequences behind shared prompts, through transformers' attention interface. Pure.

A model that is loaded with `attn_implementation=NAME` calls this module with queries, keys, values and the keyword
argument `layout`, which its caller passes to `forward`. The layout defines which tokens attend to which, and computes
only those pairs. No mask covers the row, only small blocks are masked, and the model's code is unchanged.

Shapes: T tokens in the row, Hq query heads, Hk key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ..distributed.transfer import to_device
from .gpu_kernels import say_blocks
from .shared_prefix import (
    Segments,
    Window,
    can_use_flash,
    segments,
    shared_prefix_attention,
    window_attention,
    window_of,
)

NAME = "grpo_dist"
"""The name of this attention in transformers."""

BLOCK, GPU_BLOCK = 128, 256
"""Most tokens of a masked block of short sequences. Larger blocks mask more pairs, smaller ones need more calls, which
cost a GPU more than the pairs."""


class Layout(Protocol):
    """Which tokens attend to which in a row."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None = None,
        softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of one layer: `query` (1, Hq, T, D), `key` and `value` (1, Hk, T, D) to (1, T, Hq, D). With a
        `window` a query sees only so many of the newest positions of its sequence, its own included. A `softcap` c
        makes c · tanh(score / c) of a score (arXiv:2408.00118, section 2). `sinks` (Hq,) are logits that join each
        query's softmax and have no value (gpt-oss, arXiv:2508.10925, section 2.2)."""


class PackLayout(Layout, Protocol):
    """The layout of a pack."""

    @property
    def pieces(self) -> Sequence[tuple[int, list[int]]]:
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
    return layout.attend(module.layer_idx, query, key, value, scaling, sliding_window, softcap, s_aux), None


AttentionInterface.register(NAME, _attention)


class RowLayout:
    """A row of pieces, each (prompt length, completion lengths), on any device.

    In half precision on a GPU the flash kernels compute it (`shared_prefix.py`). Otherwise blocks of masked attention
    do, which are made at their first use.
    """

    def __init__(
        self, pieces: Sequence[tuple[int, list[int]]], device: torch.device | None = None,
        segments: Segments | None = None,
    ) -> None:  # fmt: skip
        """`segments` are those of the pieces on `device`, if they are there already."""
        self.pieces, self.device = pieces, device or torch.device("cpu")
        self.longest = max(prompt + max(completions, default=0) for prompt, completions in pieces)
        self._segments = segments
        self._windows: dict[int, Window] = {}
        self._blocks: dict[int | None, BlockLayout] = {}

    def to(self, device: torch.device, segments: Segments | None = None) -> RowLayout:
        """See `PackLayout`."""
        return RowLayout(self.pieces, device, segments)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None = None,
        softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Layout`."""
        if window is not None and window >= self.longest:
            window = None
        if softcap is not None and query.is_cuda:
            say_blocks("they have no soft cap of scores")
        if softcap is not None or not can_use_flash(query, key, value):
            return self._in_blocks(window).attend(layer, query, key, value, scale, softcap=softcap, sinks=sinks)
        # not indexed: the gradient of an index is a tensor of zeros to copy to
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if window is None:
            return shared_prefix_attention(query, key, value, self._in_segments(), scale, sinks)[None]
        return window_attention(query, key, value, self._in_window(window), scale, sinks)[None]

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


@dataclass(frozen=True)
class Block:
    """Queries `queries`, the keys of the ranges `keys`, and the mask between them (None: causal).

    The queries of the blocks are consecutive. Each range of keys is the range of queries of a block. In a causal block
    the keys end with the queries' own; what is before them is computed, too, and dropped.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class BlockLayout:
    """A row as a list of blocks, in which every query occurs once."""

    blocks: list[Block]

    def to(self, device: torch.device) -> BlockLayout:
        """The layout with its masks on `device`."""
        masks = iter(to_device([block.mask for block in self.blocks if block.mask is not None], device))
        return BlockLayout([Block(b.queries, b.keys, None if b.mask is None else next(masks)) for b in self.blocks])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None = None,
        softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Layout`; the masks contain the window."""
        is_plain = softcap is None and sinks is None
        compute = (
            scaled_dot_product_attention if is_plain else partial(explicit_attention, softcap=softcap, sinks=sinks)
        )
        repeat = query.shape[1] // key.shape[1]
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        # split, not sliced: the gradient of a slice would be a full row of zeros outside the slice
        sizes = [block.queries.stop - block.queries.start for block in self.blocks]
        queries, keys, values = (x.split(sizes, 2) for x in (query, key, value))
        place = {block.queries.start: n for n, block in enumerate(self.blocks)}
        outputs = []
        for n, block in enumerate(self.blocks):
            seen = [place[part.start] for part in block.keys]
            is_causal = block.mask is None
            output = compute(
                _joined(queries, seen) if is_causal else queries[n], _joined(keys, seen), _joined(values, seen),
                attn_mask=block.mask, is_causal=is_causal, scale=scale,
            )  # fmt: skip
            outputs.append(output[:, :, -sizes[n] :])
        return _joined(outputs, range(len(outputs))).transpose(1, 2)


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention`, which has neither, with a soft cap and sinks; a mask is bool."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    products = query @ key.transpose(-2, -1)
    dtype = torch.promote_types(products.dtype, torch.float32)
    scores = cap_scores(products.to(dtype), scale, softcap)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if sinks is not None:
        columns = sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, columns], -1)
    return scores.softmax(-1)[..., : key.shape[-2]].to(value.dtype) @ value


def cap_scores(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores of the products of queries and keys."""
    return products * scale if softcap is None else softcap * torch.tanh(products * (scale / softcap))


def _joined(parts: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    """The chosen parts of a row (1, H, T, D), concatenated. A single part is not copied."""
    return parts[chosen[0]] if len(chosen) == 1 else torch.cat([parts[n] for n in chosen], 2)


def _visible(piece: Tensor, segment: Tensor) -> Tensor:
    """(T, T) bool, query by key, for T consecutive tokens of a row; `piece` and `segment` are (T,).

    A query sees keys of its piece that are not later and in the prompt (segment 0) or in its own completion.
    """
    own = (piece[:, None] == piece) & ((segment == 0) | (segment[:, None] == segment))
    return own.tril_()


def _positions(pieces: Sequence[tuple[int, list[int]]]) -> Tensor:
    """The position of each token of a row in its own sequence, (T,)."""
    ranges = [each for (prompt, completions) in pieces
              for each in ((0, prompt), *((prompt, prompt + length) for length in completions))]  # fmt: skip
    return torch.cat([torch.arange(*each) for each in ranges])


def block_layout(pieces: Sequence[tuple[int, list[int]]], block: int = BLOCK, window: int | None = None) -> BlockLayout:
    """Layout of a row of pieces, each (prompt length, completion lengths), of queries that see all of their sequence or
    a `window` of it.

    Consecutive short pieces share a masked block of at most `block` tokens. A longer piece becomes one causal block for
    its prompt, and blocks of completions, which see the prompt and themselves. A long completion is a causal block
    behind its prompt: a mask of 32,000 tokens would have a gigabyte.
    """
    piece_of: list[int] = []
    segment_of: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, (prompt, completions) in enumerate(pieces):
        start = len(piece_of)
        for place, length in enumerate([prompt, *completions]):
            piece_of += [number] * length
            segment_of += [place] * length
        spans.append((start, len(piece_of)))
    piece, segment = torch.tensor(piece_of, dtype=torch.int32), torch.tensor(segment_of, dtype=torch.int32)
    positions = None if window is None else _positions(pieces)
    blocks: list[Block] = []

    def masked(queries: slice, prompt: slice | None = None) -> None:
        mask = _visible(piece[queries], segment[queries])
        keys: tuple[slice, ...] = (queries,)
        if prompt is not None:  # all of these queries see all of their prompt
            seen = mask.new_ones((len(mask), prompt.stop - prompt.start))
            mask, keys = torch.cat([seen, mask], 1), (prompt, queries)
        if window is not None and positions is not None:
            mask &= positions[queries, None] - torch.cat([positions[part] for part in keys]) < window
        blocks.append(Block(queries, keys, mask))

    def behind(prompt: slice, queries: slice) -> None:
        size, before = queries.stop - queries.start, prompt.stop - prompt.start
        if size > max(block, before) and (window is None or before + size <= window):  # one completion
            blocks.append(Block(queries, (prompt, queries), None))
        else:
            masked(queries, prompt)

    pending: int | None = None  # start of the current run of short pieces
    for (start, end), (prompt, completions) in zip(spans, pieces, strict=True):
        if pending is not None and end - pending > block:
            masked(slice(pending, start))
            pending = None
        if end - start <= block:
            pending = start if pending is None else pending
            continue
        prompt_range = slice(start, start + prompt)
        if window is None or prompt <= window:
            blocks.append(Block(prompt_range, (prompt_range,), None))
        else:
            masked(prompt_range)
        chunk_start = chunk_end = start + prompt
        for length in completions:
            if chunk_end > chunk_start and chunk_end + length - chunk_start > block:
                behind(prompt_range, slice(chunk_start, chunk_end))
                chunk_start = chunk_end
            chunk_end += length
        if chunk_end > chunk_start:
            behind(prompt_range, slice(chunk_start, chunk_end))
    if pending is not None:
        masked(slice(pending, len(piece_of)))
    return BlockLayout(blocks)
