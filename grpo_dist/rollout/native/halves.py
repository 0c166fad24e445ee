"""Float32 weights once more in bfloat16, where that holds them exactly, as passes of few rows read them.

Such passes wait for memory: they read half as much, from one end to the other, out of large pages.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20
"""What is reserved at once: many weights lie behind one another, and few pages are not full."""


class HalvesMemory:
    """Where a model's weights are put in bfloat16."""

    def __init__(self, code: ctypes.CDLL) -> None:
        """`code` is the library of `decode.cpp`."""
        self.code = code
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self.code.put_halves.argtypes = [pointer, number, number, pointer, number]
        self.code.put_halves.restype = ctypes.c_int64
        self.block = torch.empty(0, dtype=torch.int32)

    def put(self, weight: Tensor) -> Tensor | None:
        """The words (ceil(outputs / 2), inputs) of a weight (outputs, inputs), as `Linear` of `decode.cpp` has them.

        None for a weight that is not in float32 or has numbers that bfloat16 does not hold.
        """
        if weight.dtype != torch.float32 or not weight.is_contiguous():
            return None
        outputs, inputs = weight.shape
        rows = (outputs + 1) // 2
        if rows * inputs > len(self.block):
            self.block = _reserved(max(4 * rows * inputs, BLOCK_BYTES))
        words = self.block[: rows * inputs]
        if not self.code.put_halves(weight.data_ptr(), outputs, inputs, words.data_ptr(), torch.get_num_threads()):
            return None
        self.block = self.block[rows * inputs :]
        return words.view(rows, inputs)


def _reserved(num_bytes: int) -> Tensor:
    """Memory as int32, in large pages where the system has them: of 4 KiB a pass would look up each by itself."""
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.int32)
