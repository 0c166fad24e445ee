"""Memory in large pages: a pass over weights that waits for memory looks up each page, and of 4 KiB there are many."""

from __future__ import annotations

import mmap
from contextlib import suppress
from itertools import accumulate

import torch
from torch import nn

from .compiled.library import CACHE_LINE


def reserved(num_bytes: int) -> mmap.mmap:
    """Memory that is freed with what refers to it, in large pages where the system has them."""
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


@torch.no_grad()
def lay_together(model: nn.Module, dtype: torch.dtype) -> None:
    """Move the parameters of this dtype, one behind another, into large pages, from where a loader has mapped their
    file or allocated each. Decoding steps on a CPU read them there in place."""
    parameters = [each for each in model.parameters() if each.dtype == dtype and each.numel()]
    sizes = [-(-each.nbytes // CACHE_LINE) * CACHE_LINE for each in parameters]
    if not parameters:
        return
    block = reserved(sum(sizes))
    for parameter, start in zip(parameters, accumulate(sizes, initial=0), strict=False):
        # a storage of its own: those who save weights take tensors of one storage for tied
        place = torch.frombuffer(block, dtype=dtype, count=parameter.numel(), offset=start).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)
