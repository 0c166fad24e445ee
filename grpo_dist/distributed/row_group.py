"""Ranks that divide the rows of a model among them: each computes some tokens of a row, and its attention some heads.

Before attention every rank of a group has its own tokens of all heads. It sends each rank the heads that are that
rank's, and gets from each rank that one's tokens of its own heads. After attention it goes the other way. This is
Ulysses (arXiv:2309.14509, section 3). Nothing else in a transformer looks at two tokens at once.

Shapes: a row of T tokens, t of them own; `size` ranks; W numbers of a token for one rank, its heads side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class RowGroup:
    """The ranks that share this rank's rows."""

    size: int
    number: int
    """Of the group among all groups."""
    place: int
    """Of this rank in the group."""
    process_group: dist.ProcessGroup | None
    """torch's group of these ranks; None for a group of one rank."""

    def share(self, num_tokens: int) -> slice:
        """The places of a row of `num_tokens` that are this rank's."""
        return slice(*(num_tokens * place // self.size for place in (self.place, self.place + 1)))

    def lengths(self, num_tokens: int) -> list[int]:
        """The tokens of each rank of the group, for a row of `num_tokens`."""
        return [num_tokens * (place + 1) // self.size - num_tokens * place // self.size for place in range(self.size)]


def row_group(rank: int, num_ranks: int, size: int) -> RowGroup:
    """This rank's group of `size` consecutive ranks; a collective of all ranks."""
    if size == 1:
        return RowGroup(1, rank, 0, None)
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, num_ranks, size)]
    return RowGroup(size, rank // size, rank % size, groups[rank // size])


def to_heads(x: Tensor, group: RowGroup, lengths: list[int]) -> Tensor:
    """Own tokens with all heads (size, t, W) to all tokens with the own heads (1, T, W); differentiable. A collective
    of the group."""
    return _Exchange.apply(x, group, lengths, True)


def to_tokens(x: Tensor, group: RowGroup, lengths: list[int]) -> Tensor:
    """All tokens with the own heads (1, T, W) to own tokens with all heads (size, t, W); differentiable. A collective
    of the group."""
    return _Exchange.apply(x, group, lengths, False)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RowGroup, lengths: list[int], forth: bool) -> Tensor:
        ctx.given = group, lengths, forth
        return _exchange(x, group, lengths, forth)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, lengths, forth = ctx.given
        return _exchange(grad, group, lengths, not forth), None, None, None


def _exchange(x: Tensor, group: RowGroup, lengths: list[int], forth: bool) -> Tensor:
    own, width = lengths[group.place], x.shape[-1]
    by_heads, by_tokens = [own * width] * group.size, [length * width for length in lengths]
    given, taken = (by_heads, by_tokens) if forth else (by_tokens, by_heads)
    received = x.new_empty(sum(taken))
    dist.all_to_all_single(received, x.reshape(-1), taken, given, group=group.process_group)
    return received.view(1 if forth else group.size, -1, width)
