"""Keys and values of everything in flight on a GPU, in pages: nothing grows, nothing is copied when a row ends.

A pool of pages per layer holds prompts and rows alike; tables say whose pages are which. A row that ends gives its
pages back and a new one takes them. A step of decoding reads the tables and lengths, so one captured graph serves all
steps of as many rows. Attention reads used tokens only: a tile of rows of one prompt over the prompt's pages, each row
over its own, joined under one softmax.

Shapes: R rows, P prompts, W pages of a row at most, Hq query heads, Hk key heads, D head size.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...distributed.transfer import to_device
from ...model.layout import AttentionOptions
from ..room import PAGE, pages_of
from . import triton_kernels as kernels
from .cache import EVERYTHING, PrefillLayout

TILE = 8
"""Rows of one prompt that attend to it in one tile."""
PROGRAMS = 264
"""Thread blocks that fill a GPU: a step of few rows is split into as many parts."""


class PagePool:
    """The pages, the tables of a step, and its attention. Page 0 is nobody's: rows without a request write there."""

    def __init__(
        self, device: torch.device, num_pages: int, most_rows: int, row_tokens: int, prompt_tokens: int
    ) -> None:
        """For `num_pages` pages, `most_rows` rows of `row_tokens` tokens and prompts of `prompt_tokens` at most."""
        self.device, self.num_pages = device, num_pages
        self.keys: dict[int, Tensor] = {}  # layer -> (pages, Hk, PAGE, D)
        self.values: dict[int, Tensor] = {}
        self.free = list(range(num_pages, 0, -1))
        self.table = torch.zeros((most_rows, pages_of(row_tokens)), dtype=torch.int32, device=device)
        self.lengths = torch.zeros(most_rows, dtype=torch.int32, device=device)  # own tokens in the cache
        self.prompt = torch.zeros(most_rows, dtype=torch.int64, device=device)
        self.prompt_table = torch.zeros((most_rows, pages_of(prompt_tokens)), dtype=torch.int32, device=device)
        self.prompt_lengths = torch.zeros(most_rows, dtype=torch.int32, device=device)
        self.tile_prompt = torch.zeros(2 * most_rows, dtype=torch.int32, device=device)
        self.tile_rows = torch.zeros((2 * most_rows, TILE), dtype=torch.int32, device=device)
        self.num_rows = self.num_tiles = self.splits = self.prompt_splits = 0

    def take(self, tokens: int, present: int = 0) -> list[int]:
        """The pages that are missing for `tokens` tokens where `present` pages are there."""
        return [self.free.pop() for _ in range(pages_of(tokens) - present)]

    def give_back(self, pages: list[int]) -> None:
        """Pages that nobody needs any more."""
        self.free += pages

    def store(self, prefill: PrefillLayout, pages: list[list[int]]) -> None:
        """Put the keys and values of prompts into their pages, from the row that computed them."""
        if not prefill.keys:
            raise ValueError("the model's attention never came to the layout it was given")
        page = torch.tensor([pages[n][t // PAGE] for n, length in enumerate(prefill.lengths) for t in range(length)])
        page_offset = torch.cat([torch.arange(length) % PAGE for length in prefill.lengths])
        page, page_offset = to_device([page, page_offset], self.device)
        for stores, rows in ((self.keys, prefill.keys), (self.values, prefill.values)):
            for layer, row in rows.items():
                if layer not in stores:
                    heads, _, size = row.shape
                    stores[layer] = row.new_zeros((self.num_pages + 1, heads, PAGE, size))
                stores[layer][page, :, page_offset] = row.transpose(0, 1)

    def begin_step(self, num_rows: int, num_tiles: int) -> None:
        """Say how many rows and tiles the next steps compute; what they do is in the tables."""
        self.num_rows, self.num_tiles = num_rows, num_tiles
        heads = next(iter(self.keys.values())).shape[1]
        self.splits = _splits(num_rows * heads, self.table.shape[1])
        self.prompt_splits = _splits(num_tiles * heads, self.prompt_table.shape[1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `layout.Layout`; the row's T tokens are the newest ones of the R rows, in order."""
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        lengths = self.lengths[: self.num_rows].long()
        page = self.table[: self.num_rows].gather(1, (lengths // PAGE)[:, None])[:, 0].long()
        self.keys[layer][page, :, lengths % PAGE] = key
        self.values[layer][page, :, lengths % PAGE] = value
        return self.attend_rows(layer, query, options)[None]

    def attend_rows(self, layer: int, query: Tensor, options: AttentionOptions) -> Tensor:
        """Attention of `query` (R, Hq, D), contiguous, to what is in the pages; (R, Hq, D). Pages before a `window` are
        not read."""
        keys, values = self.keys[layer], self.values[layer]
        (rows, num_queries, size), heads = query.shape, keys.shape[1]
        group, padded = num_queries // heads, max(16, triton.next_power_of_2(size))
        sizes = {"HK": heads, "G": group, "D": size, "DP": padded, "PAGE": PAGE, "CAPPED": options.softcap is not None}
        scale, seen, cap = options.scale_of(query), options.window or EVERYTHING, options.softcap or 0.0
        sinks = query if options.sinks is None else options.sinks
        parts = [query.new_empty((splits, rows, num_queries, size), dtype=torch.float32)
                 for splits in (self.prompt_splits, self.splits)]  # fmt: skip
        shared, own = parts
        shared_sums, own_sums = (part.new_empty(part.shape[:3]) for part in parts)
        width = max(triton.next_power_of_2(group), 16 // TILE)
        parts_of_tile, tokens, warps = _held(width, padded, query.dtype)
        kernels.attend_prompts[self.num_tiles * parts_of_tile, heads, self.prompt_splits](
            query, keys, values, self.prompt_table, self.prompt_lengths, self.lengths, self.tile_prompt, self.tile_rows,
            shared, shared_sums, rows, scale, seen, cap, self.prompt_table.shape[1], GP=width,
            ROWS=TILE // parts_of_tile, PARTS=parts_of_tile, SPLITS=self.prompt_splits, TOKENS=tokens, num_warps=warps,
            **sizes,
        )  # fmt: skip
        output = torch.empty_like(query)
        kernels.attend_own[rows, heads, self.splits](
            query, keys, values, self.table, self.lengths, sinks, shared, shared_sums,
            output if self.splits == 1 else own, own_sums, rows, scale, seen, cap, self.table.shape[1],
            GP=max(16, triton.next_power_of_2(group)), SPLITS=self.splits, SHARED=self.prompt_splits,
            SINKS=options.sinks is not None, TOKENS=tokens, num_warps=warps, **sizes,
        )  # fmt: skip
        if self.splits > 1:
            kernels.join[(rows * num_queries,)](own, own_sums, shared, shared_sums, output, rows * num_queries, D=size,
                                                DP=padded, OWN=self.splits, SHARED=self.prompt_splits)  # fmt: skip
        return output


def two_rows(layout: PrefillLayout) -> PagePool:
    """Two sequences of the one prompt in `layout`, about to take a step."""
    (length,) = layout.lengths
    pool = PagePool(layout.rows.device, 2 + pages_of(length), 2, 1, length)
    pages = pool.take(length)
    pool.store(layout, [pages])
    pool.prompt_table[0, : len(pages)] = torch.tensor(pages, device=pool.device)
    pool.prompt_lengths[0] = length
    pool.table[:] = torch.tensor([pool.take(1), pool.take(1)], device=pool.device)
    pool.tile_rows[0] = torch.tensor([0, 1] + [-1] * (TILE - 2), device=pool.device)
    pool.begin_step(2, 1)
    return pool


def _held(width: int, size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Parts of a tile, tokens of a page and warps of a program, so that what it holds fits into registers.

    Each row has `width` queries of `size` numbers. A program of 16 bits holds the outputs of its queries. Products in
    float32 are one instruction after another, a thousand for 16 queries of 128 numbers and 64 tokens.
    """
    warps = 8 if size > 256 // dtype.itemsize else 4
    if dtype.itemsize == 2:
        return min(TILE, max(1, TILE * width * size // 8192)), PAGE, warps
    return min(TILE, max(1, TILE * width // 16)), min(PAGE, PAGE * 128 // size), warps


def _splits(programs: int, pages: int) -> int:
    """Into how many parts each program's pages are cut: a power of two that fills the GPU, at most one part a page."""
    splits = min(max(1, PROGRAMS // programs), pages, 16)
    return 1 << int(math.log2(splits))
