"""Float32 weights as passes of few rows read them: these wait for memory.

They lie in large pages, and what a thread reads lies from one end to the other. Where bfloat16 holds them exactly they
are read from that, which is half as much.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import torch
from torch import Tensor

from ...model.compiled.library import CACHE_LINE, OUTPUTS, library
from ...model.large_pages import reserved

SOURCE = Path(__file__).with_name("relaid.cpp")
BLOCK_BYTES = 64 << 20
"""What is reserved at once: many weights lie behind one another, and few pages are not full."""
MOST_SPARE_BYTES = 512 << 20
"""Most memory that is kept from one rollout to the next: to get it anew takes ten times as long as to fill it."""
SMALLEST_GROUPED = 256 << 10
"""Bytes of the smallest weight that is put in groups: smaller ones stay in the processor's caches."""
TOGETHER = CACHE_LINE // torch.float32.itemsize
"""Numbers of each line of a group that lie together: a cache line."""


_spare: list[Tensor] = []


class RelaidWeights:
    """Where a model's weights are put in another order. What it returns is valid as long as it is there itself."""

    def __init__(self) -> None:
        """Raises CannotCompile."""
        self.code = library(SOURCE)
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self.code.put_halves.argtypes = self.code.put_groups.argtypes = [pointer, number, number, pointer, number]
        self.code.put_halves.restype, self.code.put_groups.restype = number, None
        self.block = torch.empty(0, dtype=torch.int32)
        self.blocks: list[Tensor] = []
        weakref.finalize(self, _give_back, self.blocks)

    def put_halves(self, weight: Tensor) -> Tensor | None:
        """The words (ceil(outputs / 2), inputs) of a weight (outputs, inputs), as `Linear` of `weights.h` has them.

        None for a weight that is not in float32 or has numbers that bfloat16 does not hold.
        """
        if weight.dtype != torch.float32 or not weight.is_contiguous():
            return None
        outputs, inputs = weight.shape
        words = self._room((outputs + 1) // 2 * inputs)
        if not self._put(self.code.put_halves, weight, words):
            return None
        return self._taken(words).view(-1, inputs)

    def put_groups(self, weight: Tensor) -> Tensor | None:
        """The numbers (outputs, inputs) of a weight in float32, as `Groups` of `products.h` has them. None for a small
        weight, and for one that is not made of whole groups."""
        outputs, inputs = weight.shape
        if weight.nbytes < SMALLEST_GROUPED or outputs % OUTPUTS or inputs % TOGETHER:
            return None
        words = self._room(outputs * inputs)
        self._put(self.code.put_groups, weight, words)
        return self._taken(words).view(torch.float32).view(outputs, inputs)

    def _room(self, words: int) -> Tensor:
        if words > len(self.block):
            self.block = _new_block(max(4 * words, BLOCK_BYTES))
            self.blocks.append(self.block)
        return self.block[:words]

    def _taken(self, words: Tensor) -> Tensor:
        self.block = self.block[-(-len(words) // TOGETHER) * TOGETHER :]  # what follows begins a cache line
        return words

    @staticmethod
    def _put(put: ctypes._NamedFuncPointer, weight: Tensor, words: Tensor) -> int | None:
        return put(weight.data_ptr(), *weight.shape, words.data_ptr(), torch.get_num_threads())


def _give_back(blocks: list[Tensor]) -> None:
    for block in blocks:
        if sum(each.nbytes for each in _spare) + block.nbytes <= MOST_SPARE_BYTES:
            _spare.append(block)


def _new_block(num_bytes: int) -> Tensor:
    """Memory as int32, that of an earlier rollout where there is enough."""
    for n, spare in enumerate(_spare):
        if spare.nbytes >= num_bytes:
            return _spare.pop(n)
    return torch.frombuffer(reserved(num_bytes), dtype=torch.int32)
