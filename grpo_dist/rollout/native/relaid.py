"""Weights as passes of few rows read them: these wait for memory.

They lie in large pages, and what a thread reads lies from one end to the other. Where bfloat16 holds them exactly they
take 12 or 16 bits each (`compact.h`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...model.compiled.library import CACHE_LINE, OUTPUTS, SPAN, library
from ...model.large_pages import reserved
from ...model.loaded import fits_bfloat16

SOURCE = Path(__file__).with_name("relaid.cpp")
BLOCK_BYTES = 64 << 20
"""What is reserved at once: many weights lie behind one another, and few pages are not full."""
MOST_SPARE_BYTES = 1 << 30
"""Most memory that is kept from one rollout to the next: to get it anew takes ten times as long as to fill it."""
SMALLEST_GROUPED = 256 << 10
"""Bytes of the smallest weight that is put in groups: smaller ones stay in the processor's caches."""
TOGETHER = CACHE_LINE // torch.float32.itemsize
"""Numbers of each line of a group that lie together: a cache line."""


_spare: list[Tensor] = []


@dataclass(frozen=True)
class CompactWeight:
    """The parts of `Compact` of `compact.h`, of B blocks for P pairs of lines."""

    blocks: Tensor
    """int32; of any size."""
    starts: Tensor
    """(P,) int64."""
    bases: Tensor
    """(P,) uint16."""
    whole: Tensor
    """(P, B / P) uint8."""


class Compact(ctypes.Structure):
    """That of `compact.h`, field by field."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("blocks", "starts", "bases", "whole")]

    @classmethod
    def of(cls, weight: CompactWeight) -> Compact:
        """Where a weight's parts lie."""
        return cls(*(part.data_ptr() for part in (weight.blocks, weight.starts, weight.bases, weight.whole)))


def can_be_compact(weight: Tensor) -> bool:
    """Whether `put_compact` takes a weight in float32."""
    return weight.shape[1] % SPAN == 0 and fits_bfloat16(weight)


class RelaidWeights:
    """Where a model's weights are put in another order. What it returns is valid as long as it is there itself."""

    def __init__(self) -> None:
        """Raises CannotCompile."""
        self.code = library(SOURCE)
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self.code.put_groups.argtypes = [pointer, number, number, pointer, number]
        self.code.measure_compact.argtypes = [pointer, *[number] * 4, *[pointer] * 3, number]
        self.code.measure_compact.restype = number
        self.code.put_compact.argtypes = [pointer, *[number] * 4, *[pointer] * 2, number]
        self.block = torch.empty(0, dtype=torch.int32)
        self.blocks: list[Tensor] = []
        weakref.finalize(self, _give_back, self.blocks)

    def put_compact(self, weight: Tensor, in_turn: bool) -> CompactWeight | None:
        """A weight (outputs, inputs) for products of pairs or, `in_turn`, for those in float32.

        None for a weight that is neither in float32 nor in bfloat16, whose lines are not made of whole blocks, or that
        has numbers that bfloat16 does not hold.
        """
        outputs, inputs = weight.shape
        if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous() or inputs % SPAN:
            return None
        pairs, threads = (outputs + 1) // 2, torch.get_num_threads()
        starts, bases = torch.empty(pairs, dtype=torch.int64), torch.empty(pairs, dtype=torch.uint16)
        whole = torch.empty(pairs, inputs // SPAN, dtype=torch.uint8)
        given = weight.data_ptr(), weight.dtype == torch.bfloat16, outputs, inputs, in_turn
        num_bytes = self.code.measure_compact(*given, *(x.data_ptr() for x in (starts, bases, whole)), threads)
        if num_bytes < 0:
            return None
        words = self._taken(self._room(num_bytes // 4))
        compact = CompactWeight(words, starts, bases, whole)
        self.code.put_compact(*given, ctypes.byref(Compact.of(compact)), words.data_ptr(), threads)
        return compact

    def put_groups(self, weight: Tensor) -> Tensor | None:
        """The numbers (outputs, inputs) of a weight in float32, as `Groups` of `products.h` has them. None for a small
        weight, and for one that is not made of whole groups."""
        outputs, inputs = weight.shape
        if weight.nbytes < SMALLEST_GROUPED or outputs % OUTPUTS or inputs % TOGETHER:
            return None
        words = self._room(outputs * inputs)
        self.code.put_groups(weight.data_ptr(), outputs, inputs, words.data_ptr(), torch.get_num_threads())
        return self._taken(words).view(torch.float32).view(outputs, inputs)

    def _room(self, words: int) -> Tensor:
        if words > len(self.block):
            self.block = _new_block(max(4 * words, BLOCK_BYTES))
            self.blocks.append(self.block)
        return self.block[:words]

    def _taken(self, words: Tensor) -> Tensor:
        self.block = self.block[-(-len(words) // TOGETHER) * TOGETHER :]  # what follows begins a cache line
        return words


class CompactWeights:
    """The compact weights of a run's rollouts. Those that never change are kept from one to the next."""

    def __init__(self, is_frozen: Callable[[Tensor], bool]) -> None:
        self._is_frozen = is_frozen
        self._kept: dict[tuple[int, torch.Size], tuple[Tensor, CompactWeight | None]] = {}
        self._num_bytes = 0
        self._memory: RelaidWeights | None = None

    def of(self, weight: Tensor, in_turn: bool, memory: RelaidWeights) -> CompactWeight | None:
        """`put_compact` of a weight; into `memory` where it is not kept. A run asks for one `in_turn` alone.

        Raises CannotCompile.
        """
        if not self._is_frozen(weight):
            return memory.put_compact(weight, in_turn)
        place = weight.data_ptr(), weight.shape
        if place not in self._kept:
            if self._num_bytes + torch.bfloat16.itemsize * weight.numel() > MOST_SPARE_BYTES:
                return memory.put_compact(weight, in_turn)
            if self._memory is None:
                self._memory = RelaidWeights()
            compact = self._memory.put_compact(weight, in_turn)
            self._num_bytes += 0 if compact is None else compact.blocks.nbytes
            # with the weight itself, so that no other one comes to lie in its place
            self._kept[place] = weight, compact
        return self._kept[place][1]


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
