"""The device that a rank computes on: whether it is a GPU, how CUDA is set up, and how much of its memory is taken."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that torch's allocator reads, the newer one first."""


def computes_on_gpu() -> bool:
    """Whether ranks compute on GPUs: there is one, and the launch does not ask for the CPU (`use_cpu`)."""
    asks_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    return torch.cuda.is_available() and not asks_for_cpu


def set_up_cuda() -> None:
    """Settings for a training, to be made before the first call of CUDA; a user's own stay.

    Caches and packs have ever new sizes: without segments that can grow, what one size has left free fits no other. And
    a sum over the tokens of a pack stays in float32, also where its products are in bfloat16.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


class MemoryPeaks:
    """The most memory of a rank's GPU that tensors take, in each phase of a step and in all of it; on a CPU the most
    that the process has ever taken."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._phases: dict[str, int] = {}
        self._peak = self._reserved = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Look at what is inside for `memory/NAME_gib`; phases do not lie within one another."""
        if self.device.type != "cuda":
            yield
            return
        self._look()
        try:
            yield
        finally:
            self._phases[name] = max(self._phases.get(name, 0), self._look())

    def _look(self) -> int:
        """Bytes at the fullest moment since the last look."""
        peak = torch.cuda.max_memory_allocated(self.device)
        self._peak = max(self._peak, peak)
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def metrics(self) -> dict[str, float]:
        """GiB since the last call: of each phase, of all, and what torch's allocator had reserved."""
        if self.device.type != "cuda":
            return {"memory/peak_gib": resident_peak_bytes() / 2**30}
        self._look()
        found = {f"memory/{name}_gib": peak for name, peak in self._phases.items()}
        found |= {"memory/peak_gib": self._peak, "memory/reserved_gib": self._reserved}
        self._phases, self._peak, self._reserved = {}, 0, 0
        return {name: value / 2**30 for name, value in found.items()}


def resident_peak_bytes() -> int:
    """The most memory that this process has ever had."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
