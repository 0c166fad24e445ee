"""The device that a rank computes on: whether it is a GPU, how CUDA is set up, and how much memory is in use."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..config.model import Dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that torch's allocator reads; the newer one is first."""


def computes_on_gpu() -> bool:
    """Whether ranks compute on GPUs: a GPU is there, and the launch does not ask for the CPU (`use_cpu`)."""
    asks_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    return torch.cuda.is_available() and not asks_for_cpu


def gpu_multiplies_bfloat16() -> bool:
    """Whether ranks compute on GPUs with products of bfloat16; torch emulates them on older ones, which is slow."""
    return computes_on_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether a processor with Linux has products of bfloat16; torch converts on others, which `slow_here` tells of
    only where even that is slow."""
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")) is not None


@functools.cache
def onednn_is_faster() -> bool:
    """Whether torch has oneDNN, under Linux, on a processor on which its products of float32 are faster than MKL's:
    AMD's with AVX-512 (205 GFLOP/s and 170, two cores of an EPYC 9004)."""
    if sys.platform != "linux" or not torch.backends.mkldnn.is_available():
        return False
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def resolve_dtype(name: Dtype) -> torch.dtype:
    """The torch dtype of an option; `auto` is bfloat16 on ranks with a GPU that has it and float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if gpu_multiplies_bfloat16() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The option that names a torch dtype."""
    return str(dtype).removeprefix("torch.")


def set_up_cuda() -> None:
    """Set up CUDA for a training before its first call; a user's own settings stay.

    Caches and packs often have new sizes. Segments that can grow let a freed block serve another size. A sum over the
    tokens of a pack stays in float32, also where its products are in bfloat16.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def slow_here(dtype: torch.dtype) -> str | None:
    """What to know about 16-bit weights on a device without such products; None where nothing is amiss."""
    if computes_on_gpu():
        device, is_slow = "GPU", dtype == torch.bfloat16 and not gpu_multiplies_bfloat16()
    else:
        lacks = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        device, is_slow = "CPU", dtype != torch.float32 and lacks
    if not is_slow:
        return None
    return (f"model.dtype: {dtype_name(dtype)}: this {device} has no such products, and torch's take several times as "
            "long as those of float32; model.dtype float32 is faster here")  # fmt: skip


class MemoryPeaks:
    """The most memory that tensors take on a rank's GPU, in each phase of a step and in the step; on a CPU the most
    that the process has ever taken."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._phases: dict[str, int] = {}
        self._peak = self._reserved = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak inside as `memory/NAME_gib`; phases are not nested."""
        if self.device.type != "cuda":
            yield
            return
        self._look()
        try:
            yield
        finally:
            self._phases[name] = max(self._phases.get(name, 0), self._look())

    def _look(self) -> int:
        """Peak bytes since the last look."""
        peak = torch.cuda.max_memory_allocated(self.device)
        self._peak = max(self._peak, peak)
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def metrics(self) -> dict[str, float]:
        """Peak GiB since the last call: of each phase, of all, and what torch's allocator reserved."""
        if self.device.type != "cuda":
            return {"memory/peak_gib": resident_peak_bytes() / 2**30}
        self._look()
        peaks = {f"memory/{name}_gib": peak for name, peak in self._phases.items()}
        peaks |= {"memory/peak_gib": self._peak, "memory/reserved_gib": self._reserved}
        self._phases, self._peak, self._reserved = {}, 0, 0
        return {name: value / 2**30 for name, value in peaks.items()}


def resident_peak_bytes() -> int:
    """The most memory that this process has ever taken."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
