"""What a step of decoding costs a GPU, counted on the simulated one: kernels, what its rows read, memory."""

from __future__ import annotations

from typing import Any

import pytest
from launching import printed


@pytest.fixture(scope="module")
def counts() -> Any:
    return printed("simulated_decoding.py")


@pytest.mark.parametrize("name", ["many rows", "few rows", "top-p", "gemma"])
def test_a_step_takes_few_kernels(counts: Any, name: str) -> None:
    """28 layers, shared prompts, adapters apart on every linear layer."""
    assert counts[name] <= 480
    assert counts["without adapters"] <= 380


def test_first_tokens_are_drawn_from_logits_of_32_bits(counts: Any) -> None:
    """As the others are, by the fused step, and as the update scores them."""
    assert counts["first logits"] == "torch.float32"


@pytest.mark.slow
def test_the_bound_of_a_steps_time_counts_every_kernel_and_product(counts: Any) -> None:
    step = printed("decoding_roofline.py")["H100: 512 rows, 512 own tokens"]
    assert step["kernels"] == counts["many rows"]
    # two operations a parameter and row
    products = sum(step["groups"][name]["tflop"] for name in ("products", "head's products"))
    assert products == pytest.approx(2 * 1.5437e9 * 512 / 1e12, rel=0.02)


def test_all_completions_are_decoded_at_once(counts: Any) -> None:
    """512 completions of up to 1,024 tokens, with as many tokens in flight as 80 GB have room for: no row waits for
    another, and none takes a step after its last token."""
    assert counts["full"]["at once"] == 512
    assert counts["full"]["steps"] == 8 and counts["full"]["right"]


def test_little_is_read_but_for_rows_that_live(counts: Any) -> None:
    """Lengths around 300 tokens, 100 off."""
    assert counts["normal"]["ratio"] <= 1.1
    assert counts["normal"]["right"] and counts["normal"]["leaked"] == 0


def test_pages_and_graphs_are_gone_when_the_engine_sleeps(counts: Any) -> None:
    """Also where it is put to sleep in the middle; then the allocator gives back what it kept for them. It has given
    back what it kept of an update when the engine wakes: a capture takes nothing of that."""
    assert counts["memory"]["pools"] == 2 and counts["memory"]["replays"] > 10
    assert counts["memory"]["left"] == [0] * 4


def test_all_steps_are_captured_on_one_stream(counts: Any) -> None:
    """cuBLAS keeps memory for each."""
    assert counts["memory"]["streams"] == 1
