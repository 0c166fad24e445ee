"""What a pack costs a GPU, counted on the simulated one: kernels, waits of the host, masks."""

from __future__ import annotations

from typing import Any

import pytest
from launching import printed

from grpo_dist.model import flash_trial
from grpo_dist.model.shared_prefix import segments


@pytest.fixture(scope="module")
def counts() -> Any:
    return printed("simulated_packs.py")


def test_a_pack_takes_few_kernels(counts: Any) -> None:
    """28 layers, 4 x (256 + 16 x 240) tokens, adapters on every linear layer: forward and backward pass."""
    assert counts["update"]["kernels"] <= 6000
    assert counts["attention"]["kernels"] <= 25 and counts["window"]["kernels"] <= 25


def test_the_fused_operations_of_an_update_are_the_plain_ones(counts: Any) -> None:
    """Norms, gates, rotations, adapters of one input, attention and the head, against the CPU's in float32."""
    assert counts["error"] < 0.04


@pytest.mark.parametrize("name", ["update", "reference", "attention", "window"])
def test_the_host_never_waits_for_a_pack(counts: Any, name: str) -> None:
    assert counts[name]["waits"] == []


def test_there_are_no_masks(counts: Any) -> None:
    """512 completions of 4,096 tokens behind prompts of 512: bounds and places of prompts in place of 9 GiB."""
    assert counts["attention"]["blocks"] == counts["window"]["blocks"] == 0
    tensors = segments([(512, [4096] * 16)] * 32).tensors
    assert all(each.dim() == 1 for each in tensors) and sum(each.nbytes for each in tensors) < 1 << 18


def test_flash_kernels_that_are_wrong_or_other_are_not_used(counts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counts["wrong kernels"]["blocks"] == 1
    assert counts["wrong kernels"]["reason"].startswith("they are off by ")
    assert flash_trial._other_arguments() is None
    name = "_flash_attention_backward"
    arguments, results = flash_trial.FLASH_ARGUMENTS[name]
    for other in ((arguments.replace("max_q max_k", "max_k max_q"), results), (arguments, results + 1)):
        monkeypatch.setitem(flash_trial.FLASH_ARGUMENTS, name, other)
        assert f"{name} of torch" in str(flash_trial._other_arguments())


@pytest.mark.slow
def test_the_bound_of_a_packs_time_counts_every_kernel_and_product(counts: Any) -> None:
    bound = printed("roofline.py")
    assert bound["kernels"] == pytest.approx(counts["update"]["kernels"], rel=0.01)
    # with frozen weights: one product forward and one back, 2 operations a parameter and token each
    products = sum(bound["groups"][name]["tflop"] for name in ("products", "head's products"))
    assert products == pytest.approx(4 * 1.5437 * 16.384, rel=0.02)
