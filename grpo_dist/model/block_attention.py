"""Attention of a row of pieces on any device: blocks of masked attention, which together hold every query once. Pure.

Shapes: T tokens in the row, Hq query heads, Hk key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..distributed.transfer import to_device
from .layout import AttentionOptions, Pieces

BLOCK, GPU_BLOCK = 128, 256
"""Most tokens of a masked block of short sequences. Larger blocks mask more pairs, smaller ones need more calls, which
cost a GPU more than the pairs."""


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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Layout`; the masks contain the window."""
        compute: Callable[..., Tensor]
        if options.softcap is None and options.sinks is None:
            compute = partial(scaled_dot_product_attention, scale=options.scale)
        else:
            compute = partial(explicit_attention, options=options)
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
                attn_mask=block.mask, is_causal=is_causal,
            )  # fmt: skip
            outputs.append(output[:, :, -sizes[n] :])
        return _joined(outputs, range(len(outputs))).transpose(1, 2)


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, options: AttentionOptions
) -> Tensor:
    """`scaled_dot_product_attention`, which has neither, with a soft cap and sinks; a mask is bool."""
    products = query @ key.transpose(-2, -1)
    dtype = torch.promote_types(products.dtype, torch.float32)
    scores = cap_scores(products.to(dtype), options.scale_of(query), options.softcap)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if options.sinks is not None:
        columns = options.sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
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


def block_layout(pieces: Pieces, block: int = BLOCK, window: int | None = None) -> BlockLayout:
    """Layout of a row of pieces, each (prompt length, completion lengths), of queries that see all of their sequence or
    a `window` of it.

    Consecutive short pieces share a masked block of at most `block` tokens. A longer piece becomes one causal block for
    its prompt, and blocks of completions, which see the prompt and themselves. A long completion is a causal block
    behind its prompt: a mask of 32,000 tokens would have a gigabyte.
    """
    blocks = _Blocks(pieces, block, window)
    start, pending = 0, None  # pending: start of the current run of short pieces
    for prompt, completions in pieces:
        end = start + prompt + sum(completions)
        if pending is not None and end - pending > block:
            blocks.masked(slice(pending, start))
            pending = None
        if end - start > block:
            blocks.of_long_piece(slice(start, start + prompt), completions)
        elif pending is None:
            pending = start
        start = end
    if pending is not None:
        blocks.masked(slice(pending, start))
    return BlockLayout(blocks.found)


class _Blocks:
    """The blocks of a row that have been `found`."""

    def __init__(self, pieces: Pieces, block: int, window: int | None) -> None:
        self.pieces, self.block, self.window = pieces, block, window
        piece_of = [n for n, (prompt, completions) in enumerate(pieces) for _ in range(prompt + sum(completions))]
        segment_of = [place for prompt, completions in pieces for place, length in enumerate([prompt, *completions])
                      for _ in range(length)]  # fmt: skip
        self.piece, self.segment = (torch.tensor(each, dtype=torch.int32) for each in (piece_of, segment_of))
        self.found: list[Block] = []

    @cached_property
    def positions(self) -> Tensor:
        """The position of each token of the row in its own sequence, (T,)."""
        ranges = [each for (prompt, completions) in self.pieces
                  for each in ((0, prompt), *((prompt, prompt + length) for length in completions))]  # fmt: skip
        return torch.cat([torch.arange(*each) for each in ranges])

    def masked(self, queries: slice, prompt: slice | None = None) -> None:
        """A block with a mask, of queries among themselves and behind all of their `prompt`."""
        mask = _visible(self.piece[queries], self.segment[queries])
        keys: tuple[slice, ...] = (queries,)
        if prompt is not None:
            seen = mask.new_ones((len(mask), prompt.stop - prompt.start))
            mask, keys = torch.cat([seen, mask], 1), (prompt, queries)
        if self.window is not None:
            mask &= self.positions[queries, None] - torch.cat([self.positions[part] for part in keys]) < self.window
        self.found.append(Block(queries, keys, mask))

    def of_long_piece(self, prompt: slice, completions: list[int]) -> None:
        """The blocks of a prompt and of its completions."""
        if self.window is None or prompt.stop - prompt.start <= self.window:
            self.found.append(Block(prompt, (prompt,), None))
        else:
            self.masked(prompt)
        start = end = prompt.stop
        for length in completions:
            if end > start and end + length - start > self.block:
                self._behind(prompt, slice(start, end))
                start = end
            end += length
        if end > start:
            self._behind(prompt, slice(start, end))

    def _behind(self, prompt: slice, queries: slice) -> None:
        size, before = queries.stop - queries.start, prompt.stop - prompt.start
        is_one = size > max(self.block, before)  # completion
        if is_one and (self.window is None or before + size <= self.window):
            self.found.append(Block(queries, (prompt, queries), None))
        else:
            self.masked(queries, prompt)
