"""Who is in flight on a GPU, and the tables that tell the next steps whose pages are which.

Shapes: R rows computed.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...distributed.transfer import to_device
from ..engine import Request
from .pages import TILE, PagePool

LADDER = [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
"""Numbers of rows for which a step is captured; above the last one, its multiples."""


@dataclass
class PromptInFlight:
    """A prompt in flight."""

    ids: list[int]
    place: int
    """Its line in the tables."""
    pages: list[int]
    rows: int
    """Rows that still need it."""


@dataclass(eq=False)
class RowInFlight:
    """A sequence in flight: it has a seat and pages."""

    request: Request
    seat: int
    prompt: PromptInFlight
    room: int
    """Most tokens of its own, those after turns to come among them."""
    limit: int
    """Most of them with those that are drawn for the request."""
    pages: list[int] = field(default_factory=list)
    length: int = 0
    """Its own tokens in the cache, one more each step: an upper bound once it has ended, and at most the limit."""
    own: list[int] = field(default_factory=list)
    """Its own tokens before the first one that is drawn for the request; of a row that is kept, all of them."""


def lay_tables(pool: PagePool, rows: list[RowInFlight]) -> tuple[int, int]:
    """Tell the device whose pages are which; returns the numbers of rows and of tiles that its steps compute."""
    members: dict[int, tuple[PromptInFlight, list[int]]] = {}
    for n, row in enumerate(rows):
        members.setdefault(row.prompt.place, (row.prompt, []))[1].append(n)
    tiles = [(prompt.place, of[start : start + TILE])
             for prompt, of in members.values() for start in range(0, len(of), TILE)]  # fmt: skip
    computed, num_tiles = rung(len(rows)), 1 << (len(tiles) - 1).bit_length() if tiles else 1
    spare = num_tiles - len(tiles)
    tables = [
        (pool.table[:computed], _table([row.pages for row in rows], computed, pool.table.shape[1])),
        (pool.prompt_table, _table({p.place: p.pages for p, _ in members.values()}, *pool.prompt_table.shape)),
        (pool.prompt_lengths, _column({p.place: len(p.ids) for p, _ in members.values()}, len(pool.prompt_lengths))),
        (pool.prompt[:computed], _column([row.prompt.place for row in rows], computed)),
        (pool.tile_prompt[:num_tiles], torch.tensor([place for place, _ in tiles] + [-1] * spare)),
        (pool.tile_rows[:num_tiles],
         torch.tensor([of + [-1] * (TILE - len(of)) for _, of in tiles] + [[-1] * TILE] * spare)),
    ]  # fmt: skip
    for (to, _), sent in zip(tables, to_device([values.int() for _, values in tables], pool.device), strict=True):
        to.copy_(sent)
    return computed, num_tiles


def rung(rows: int) -> int:
    """How many rows are computed for `rows` of them."""
    top = LADDER[-1]
    return LADDER[bisect_left(LADDER, rows)] if rows <= top else -(-rows // top) * top


def _table(pages: list[list[int]] | dict[int, list[int]], rows: int, width: int) -> Tensor:
    table = [[0] * width for _ in range(rows)]  # one tensor of lists: a tensor for each row takes ten times as long
    for n, each in pages.items() if isinstance(pages, dict) else enumerate(pages):
        table[n][: len(each)] = each
    return torch.tensor(table, dtype=torch.int32)


def _column(values: list[int] | dict[int, int], rows: int) -> Tensor:
    column = [0] * rows
    for n, each in values.items() if isinstance(values, dict) else enumerate(values):
        column[n] = each
    return torch.tensor(column, dtype=torch.int32)
