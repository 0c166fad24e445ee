"""Attention for rows of several sequences behind shared prompts, through transformers' attention interface. Pure.

A model loaded with `attn_implementation=NAME` hands queries, keys and values here together with the keyword argument
`layout` its caller passed to `forward`. The layout knows who attends to whom and computes only that: no mask of the
whole row exists, nothing is computed to be masked away but inside small blocks, and the model's code is untouched.

Shapes: T tokens in the row, Hq query heads, Hk key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from .shared_prefix import Segments, can_use_flash, segments, shared_prefix_attention

NAME = "grpo_dist"
"""The name under which transformers knows this attention."""

BLOCK = 256
"""Tokens of short sequences attended to in one masked block; larger wastes on masks, smaller on calls."""


class Layout(Protocol):
    """Who attends to whom in a row."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of one layer: `query` (1, Hq, T, D), `key` and `value` (1, Hk, T, D) to (1, T, Hq, D)."""


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, *, layout: Layout | None = None, **unused: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The entry point transformers calls; dropout is ignored on purpose (a rollout and its update must agree)."""
    if layout is None:
        raise ValueError(f"a model with attn_implementation={NAME!r} was called without the keyword argument `layout`")
    if unused.get("softcap") is not None or unused.get("s_aux") is not None:
        raise ValueError(f"attn_implementation={NAME!r} has neither soft-capped scores nor attention sinks")
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, _attention)


class RowLayout:
    """A row of pieces, each (prompt length, completion lengths), wherever it is computed.

    In half precision on a GPU the flash kernels compute it (`shared_prefix.py`), else blocks of masked attention, which
    are laid out when they are first asked for.
    """

    def __init__(self, pieces: Sequence[tuple[int, list[int]]], device: torch.device | None = None) -> None:
        self.pieces, self.device = pieces, device or torch.device("cpu")

    def to(self, device: torch.device) -> RowLayout:
        """The layout with its tensors on `device`."""
        return RowLayout(self.pieces, device)

    @cached_property
    def blocks(self) -> BlockLayout:
        """The row as blocks."""
        return block_layout(self.pieces).to(self.device)

    @cached_property
    def segments(self) -> Segments:
        """The row as the flash kernels want it."""
        return segments(self.pieces).to(self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `Layout`."""
        if not can_use_flash(query, key, value):
            return self.blocks.attend(layer, query, key, value, scale)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        return shared_prefix_attention(query, key, value, self.segments, scale)[None]


@dataclass(frozen=True)
class Block:
    """Queries `queries`, the keys of the ranges `keys`, and the mask between them (None: causal).

    The blocks' queries follow one another, and each range of keys is some block's queries.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class BlockLayout:
    """A row as a list of blocks that together hold every query once."""

    blocks: list[Block]

    def to(self, device: torch.device) -> BlockLayout:
        """The layout with its masks on `device`."""
        return BlockLayout([Block(b.queries, b.keys, None if b.mask is None else b.mask.to(device))
                            for b in self.blocks])  # fmt: skip

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `Layout`."""
        repeat = query.shape[1] // key.shape[1]
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        # split, not sliced: each slice's gradient would be a whole row of zeros but for the slice
        sizes = [block.queries.stop - block.queries.start for block in self.blocks]
        queries, keys, values = (x.split(sizes, 2) for x in (query, key, value))
        place = {block.queries.start: n for n, block in enumerate(self.blocks)}
        outputs = []
        for n, block in enumerate(self.blocks):
            seen = [place[part.start] for part in block.keys]
            outputs.append(scaled_dot_product_attention(
                queries[n], _joined(keys, seen), _joined(values, seen),
                attn_mask=block.mask, is_causal=block.mask is None, scale=scale,
            ))  # fmt: skip
        return _joined(outputs, range(len(outputs))).transpose(1, 2)


def _joined(parts: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    """The chosen parts of a row (1, H, T, D) one after another; no copy of a single one."""
    return parts[chosen[0]] if len(chosen) == 1 else torch.cat([parts[n] for n in chosen], 2)


def _visible(piece: Tensor, segment: Tensor) -> Tensor:
    """(T, T) bool, query by key, for T tokens that follow one another in a row; `piece` and `segment` are (T,).

    Seen is a key of the same piece, not later, in the prompt (segment 0) or in the query's own completion.
    """
    own = (piece[:, None] == piece) & ((segment == 0) | (segment[:, None] == segment))
    return own.tril_()


def block_layout(pieces: Sequence[tuple[int, list[int]]], block: int = BLOCK) -> BlockLayout:
    """Layout of a row of pieces, each (prompt length, completion lengths).

    Short pieces that follow one another share a masked block of at most `block` tokens. A longer piece becomes one
    causal block for its prompt and blocks of completions, which see the prompt and themselves.
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
    blocks: list[Block] = []

    def masked(queries: slice, prompt: slice | None = None) -> None:
        mask = _visible(piece[queries], segment[queries])
        if prompt is None:
            blocks.append(Block(queries, (queries,), mask))
        else:  # all of these queries see all of their prompt
            seen = mask.new_ones((len(mask), prompt.stop - prompt.start))
            blocks.append(Block(queries, (prompt, queries), torch.cat([seen, mask], 1)))

    pending: int | None = None  # where a run of short pieces began
    for (start, end), (prompt, completions) in zip(spans, pieces, strict=True):
        if pending is not None and end - pending > block:
            masked(slice(pending, start))
            pending = None
        if end - start <= block:
            pending = start if pending is None else pending
            continue
        prompt_range = slice(start, start + prompt)
        blocks.append(Block(prompt_range, (prompt_range,), None))
        chunk_start = chunk_end = start + prompt
        for length in completions:
            if chunk_end > chunk_start and chunk_end + length - chunk_start > block:
                masked(slice(chunk_start, chunk_end), prompt_range)
                chunk_start = chunk_end
            chunk_end += length
        if chunk_end > chunk_start:
            masked(slice(chunk_start, chunk_end), prompt_range)
    if pending is not None:
        masked(slice(pending, len(piece_of)))
    return BlockLayout(blocks)
