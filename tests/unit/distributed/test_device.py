"""How CUDA is set up, and how much of a GPU's memory each phase is said to take."""

from __future__ import annotations

import os

import pytest
import torch

from grpo_dist.distributed.device import ALLOCATOR, MemoryPeaks, resolve_dtype, set_up_cuda, slow_here
from grpo_dist.planning.predict import dtype_on

GIB = 2**30


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, dict.fromkeys(ALLOCATOR, "expandable_segments:True")),
     ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
     ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"})],
)  # fmt: skip
def test_segments_can_grow_unless_the_user_says_something(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR:
        monkeypatch.setenv(name, given.get(name, ""))
        if name not in given:
            monkeypatch.delenv(name)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    set_up_cuda()
    assert {name: os.environ[name] for name in ALLOCATOR if name in os.environ} == expected
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


class Allocator:
    """Torch's counters of a GPU's memory, without the GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.most)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 2 * self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, _: torch.device) -> None:
        self.most = self.now

    def take(self, gib: int, keep: int = 0) -> None:
        """Have so much more for a moment, and keep some of it."""
        self.most = max(self.most, self.now + gib * GIB)
        self.now += keep * GIB


def test_peaks_are_those_of_each_phase_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    memory = MemoryPeaks(torch.device("cuda", 0))
    allocator.take(50, keep=4)  # while models are loaded
    assert memory.metrics()["memory/peak_gib"] == 50
    with memory.phase("rollout"):
        allocator.take(30)
    allocator.take(40)  # between phases
    with memory.phase("update"):
        allocator.take(16, keep=1)
    with memory.phase("rollout"):  # once more, with less
        allocator.take(2)
    assert memory.metrics() == {"memory/rollout_gib": 34, "memory/update_gib": 20, "memory/peak_gib": 44,
                                "memory/reserved_gib": 88}  # fmt: skip
    with memory.phase("update"):
        allocator.take(7)
    assert memory.metrics() == {"memory/update_gib": 12, "memory/peak_gib": 12, "memory/reserved_gib": 24}


def test_a_phase_that_fails_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    memory = MemoryPeaks(torch.device("cuda", 0))
    with pytest.raises(KeyError), memory.phase("update"):
        allocator.take(3)
        raise KeyError
    assert memory.metrics()["memory/update_gib"] == 3


def test_a_cpu_knows_its_process_alone() -> None:
    memory = MemoryPeaks(torch.device("cpu"))
    with memory.phase("update"):
        pass
    assert 0.01 < memory.metrics().pop("memory/peak_gib") < 1000 and len(memory.metrics()) == 1


@pytest.mark.parametrize(
    ("dtype", "has_products", "expected"),
    [(torch.bfloat16, False, "model.dtype: bfloat16"), (torch.bfloat16, True, None), (torch.float32, False, None)],
)
def test_a_cpu_without_products_of_16_bit_numbers_is_named(
    dtype: torch.dtype, has_products: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_products, raising=False)
    said = slow_here(dtype)
    assert said is None if expected is None else said is not None and said.startswith(expected)


@pytest.mark.parametrize("is_old", [True, False])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volta and Turing: torch says that they support it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not is_old
    )
    expected = torch.float32 if is_old else torch.bfloat16
    assert resolve_dtype("auto") == dtype_on("gpu", "auto") == expected and dtype_on("cpu", "auto") == torch.float32
    said = slow_here(torch.bfloat16)
    assert is_old == (said is not None and said.startswith("model.dtype: bfloat16: this GPU"))
    assert slow_here(torch.float16) is None
