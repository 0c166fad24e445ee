"""The draw of a step's tokens on a GPU, in a few kernels (`draw_kernels.py`) that do not sort the vocabulary.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..sampling import Rules, Sampling, draw
from . import draw_kernels

BLOCK = 1024
"""Tokens of the vocabulary whose probabilities are summed at once."""
WAYS, PASSES = 8, 12
"""A search for a threshold looks at so many numbers in a pass; so many passes tell all numbers of 32 bits apart."""


def fused_draw(
    logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling, rules: Rules | None = None
) -> tuple[Tensor, Tensor]:
    """`sampling.draw` in two kernels, one more with bans, and two more where the distribution is truncated; greedy as
    there."""
    if sampling.greedy:
        return draw(logits, keys, positions, sampling, rules)
    rows, size = logits.shape
    logits, blocks = logits.contiguous(), triton.cdiv(size, BLOCK)
    peaks, totals = logits.new_empty((2, rows, blocks), dtype=torch.float32)
    all_peaks, all_totals, floors = peaks, totals, peaks
    token, logprob = torch.empty_like(keys), peaks.new_empty(rows)
    sizes = {"BLOCK": BLOCK, "PEAKS": triton.next_power_of_2(blocks)}
    has_bans, bans, least = False, keys, 0
    if rules is not None and rules.bans:
        has_bans, bans, least = True, rules.bans_of(size), rules.least
    shape = size, blocks, sampling.temperature, bans, positions, least
    draw_kernels.sum_blocks[rows, blocks](logits, floors, peaks, totals, *shape, BANS=False, FLOOR=False, BLOCK=BLOCK)
    if has_bans:
        peaks, totals = torch.empty_like(peaks), torch.empty_like(totals)
        draw_kernels.sum_blocks[rows, blocks](logits, floors, peaks, totals, *shape, BANS=True, FLOOR=False,
                                              BLOCK=BLOCK)  # fmt: skip
    if sampling.truncates:
        floors = peaks.new_empty(rows)
        draw_kernels.find_floors[(rows,)](
            logits, peaks, floors, *shape, sampling.top_p, sampling.top_k,
            math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf, WAYS=WAYS, PASSES=PASSES, num_warps=8,
            BANS=has_bans, TOP_K=sampling.top_k > 0, TOP_P=sampling.top_p < 1, **sizes,
        )  # fmt: skip
        peaks, totals = torch.empty_like(peaks), torch.empty_like(totals)
        draw_kernels.sum_blocks[rows, blocks](logits, floors, peaks, totals, *shape, BANS=has_bans, FLOOR=True,
                                              BLOCK=BLOCK)  # fmt: skip
    draw_kernels.draw_token[(rows,)](logits, floors, peaks, totals, all_peaks, all_totals, keys, token, logprob, *shape,
                                     BANS=has_bans, FLOOR=sampling.truncates, **sizes)  # fmt: skip
    return token, logprob
