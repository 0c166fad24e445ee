"""The parts of a rank's memory, as sums worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from counted_model import COUNTS, INPUTS

from grpo_dist.planning.memory import MemoryInputs, Part, memory_per_rank, peaks, slots_held

BASE = {
    # of every rank, for any strategy
    "frozen copy": 2 * 1_000_003, "activations of a pack": 700_000, "reference pass": 300_000,
    "keys and values": (4 * 100 + 32 * 64) * 3 * 128 * 2,
    "decoding or prefill": 32 * 8 * 150 * 2 * (2 + 4),  # scores and their float32 copy: more than logits, no prefill
}  # fmt: skip
WITH_ADAPTERS = {
    "DDP": {"frozen weights": 2 * 1_000_003, "adapters": 4 * 50_001, "optimizer": 8 * 50_001,
            "DDP gradient buckets": 4 * 50_001, "gradients": 4 * 50_001, "stepped gradients": 4 * 50_001},
    "ZeRO-1": {"frozen weights": 2 * 1_000_003, "adapters": 4 * 50_001, "optimizer": (8 + 4) * 16_667,
               "gradients": 4 * 50_001, "gradient bucket": 4 * 50_001, "stepped gradients": (4 + 4) * 16_667},
    "ZeRO-2": {"frozen weights": 2 * 1_000_003, "adapters": 4 * 50_001, "optimizer": (8 + 4) * 16_667,
               "gradients": 4 * 50_001, "gradient bucket": 4 * 50_001, "stepped gradients": (4 + 4) * 16_667},
    "ZeRO-3": {"frozen weights": 2 * (332_000 + 4_003), "adapters": 4 * 16_667, "optimizer": (8 + 4) * 16_667,
               "gradient bucket, shard": 4 * (50_001 + 16_667), "stepped gradients": (4 + 4) * 16_667,
               "gathered weights": 2 * 996_000},
    "FSDP2": {"frozen weights": 2 * 333_335, "adapters": 4 * 16_667, "optimizer": 8 * 16_667,
              "gradients": 4 * 16_667, "gradients of a unit": (4 + 4) * 16_667, "stepped gradients": 4 * 16_667,
              "gathered weights": 2 * (1_000_003 + 50_001 - 290_000)},
}  # fmt: skip
ALL_WEIGHTS = {
    "DDP": {"policy weights": 4 * 1_000_003, "optimizer": 8 * 1_000_003, "DDP gradient buckets": 4 * 1_000_003,
            "gradients": 4 * 1_000_003, "stepped gradients": 4 * 1_000_003},
    "ZeRO-2": {"policy weights": 4 * 1_000_003, "optimizer": (8 + 4) * 333_335, "gradients": 4 * 1_000_003,
               "gradient bucket": 4 * 1_000_003, "stepped gradients": (4 + 4) * 333_335},
    "ZeRO-3": {"policy weights": 4 * 333_335, "optimizer": (8 + 4) * 333_335,
               "gradient bucket, shard": 4 * (1_000_003 + 333_335), "stepped gradients": (4 + 4) * 333_335,
               "gathered weights": 0},
    "FSDP2": {"policy weights": 4 * 333_335, "optimizer": 8 * 333_335, "gradients": 4 * 333_335,
              "gradients of a unit": (4 + 4) * 290_000, "stepped gradients": 4 * 333_335,
              "gathered weights": 2 * (1_000_003 - 290_000)},
}  # fmt: skip
"""Weights that are all trained in float32 decode from a copy in bfloat16."""


def named(inputs: MemoryInputs) -> dict[str, int]:
    """Bytes by the parts' names, none of which comes twice."""
    parts = memory_per_rank(inputs)
    assert len({part.name for part in parts}) == len(parts)
    return {part.name: part.num_bytes for part in parts}


@pytest.mark.parametrize("strategy", WITH_ADAPTERS)
def test_every_part_with_adapters(strategy: Any) -> None:
    assert named(replace(INPUTS, strategy=strategy)) == BASE | WITH_ADAPTERS[strategy]


@pytest.mark.parametrize("strategy", ALL_WEIGHTS)
def test_every_part_where_all_weights_are_trained(strategy: Any) -> None:
    counts = replace(COUNTS, adapters=0, adapted=0)
    expected = BASE | ALL_WEIGHTS[strategy] | {"rollout weights": 2 * 1_000_003}
    assert named(replace(INPUTS, counts=counts, strategy=strategy)) == expected
    large_head = replace(counts, layer=200_000)
    assert named(replace(INPUTS, counts=large_head, strategy="FSDP2"))["gradients of a unit"] == 8 * 400_003


def test_one_rank_has_no_buckets() -> None:
    buckets = [named(replace(INPUTS, num_ranks=number)).get("DDP gradient buckets") for number in (1, 2)]
    assert buckets == [None, 4 * 50_001]


def test_adapters_that_are_cast_take_their_own_bytes() -> None:
    cast = {strategy: named(replace(INPUTS, strategy=strategy, trained_bytes=2)) for strategy in ("ZeRO-2", "FSDP2")}
    zero2, fsdp2 = cast["ZeRO-2"], cast["FSDP2"]
    assert zero2["adapters"] == zero2["gradients"] == zero2["gradient bucket"] == 2 * 50_001
    assert zero2["stepped gradients"] == (2 + 4) * 16_667 and zero2["optimizer"] == (8 + 4) * 16_667
    assert fsdp2["adapters"] == fsdp2["gradients"] == fsdp2["stepped gradients"] == 4 * 16_667, "stored in float32"
    assert fsdp2["gradients of a unit"] == (2 + 4) * 16_667


def test_sharded_sizes_are_rounded_up() -> None:
    of_four = named(replace(INPUTS, strategy="FSDP2", num_ranks=4))
    assert (of_four["frozen weights"], of_four["adapters"]) == (2 * 250_001, 4 * 12_501)


def test_a_model_of_one_layer_is_gathered_whole() -> None:
    one = named(replace(INPUTS, counts=replace(COUNTS, num_layers=1), strategy="FSDP2"))
    assert one["gathered weights"] == 2 * (1_000_003 + 50_001) and one["gradients of a unit"] == 8 * 50_001


def test_slots_grow_by_a_half_until_there_is_one_to_spare() -> None:
    """64, 128, 192, 288, 432, ...: a sequence that ends there needs no more, any other has one more than it needs."""
    held = {longest: slots_held(0, longest, 64) for longest in (0, 1, 63, 64, 65, 128, 129, 192, 256, 288, 432, 433)}
    assert held == {0: 0, 1: 2, 63: 64, 64: 64, 65: 66, 128: 128, 129: 130, 192: 192, 256: 257, 288: 288, 432: 432,
                    433: 434}  # fmt: skip
    assert (slots_held(50, 64, 64), slots_held(50, 65, 64), slots_held(50, 0, 64)) == (114, 116, 50)


def test_deepspeed_bounds_what_it_gathers_and_reduces_at_once() -> None:
    counts = replace(COUNTS, parameters=3_000_000_000, adapters=600_000_000)
    parts = named(replace(INPUTS, counts=counts, strategy="ZeRO-3"))
    assert parts["gathered weights"] == 2 * 1_000_000_000
    assert parts["gradient bucket, shard"] == 4 * (500_000_000 + 200_000_000)
    assert named(replace(INPUTS, counts=counts, strategy="ZeRO-2"))["gradient bucket"] == 4 * 500_000_000


def test_the_reference_gathers_a_base_that_has_no_copy() -> None:
    shared = replace(INPUTS, strategy="ZeRO-3", copy_bytes=0, copy_decodes=False)
    gathered = [part for part in memory_per_rank(shared) if part.name == "gathered weights"]
    assert gathered == [Part("gathered weights", 2 * 996_000, phase) for phase in ("update", "reference")]
    without = replace(shared, passes=replace(INPUTS.passes, reference=0))
    assert [part.phase for part in memory_per_rank(without) if part.name == "gathered weights"] == ["update"]
    for strategy, elements in (("ZeRO-3", 996_000), ("FSDP2", 1_000_003)):
        parts = memory_per_rank(replace(shared, strategy=strategy))
        assert Part("gathered policy", 2 * elements, "rollout") in parts, "rollouts decode from it"


def test_a_quantised_base() -> None:
    counts = replace(COUNTS, quantized=600_000, quantized_bytes=310_000)
    parts = named(replace(INPUTS, counts=counts))
    assert parts["frozen weights"] == 2 * 400_003 + 310_000 and parts["dequantised base"] == 2 * 600_000
    assert "dequantised base" not in named(replace(INPUTS, counts=counts, dequantizes=False))


def test_the_larger_of_a_step_and_the_prefill() -> None:
    """A step's logits, its scores, or the prefill, while which no sequence has a cache yet."""
    drawing = replace(INPUTS, flight=replace(INPUTS.flight, scored=0))
    assert named(drawing)["decoding or prefill"] == 32 * 500 * (2 + 8)
    prefill = replace(INPUTS, passes=replace(INPUTS.passes, prefill_per_token=10_000))
    assert named(prefill)["decoding or prefill"] == 4 * 100 * 10_000 - 32 * 64 * 3 * 128 * 2
    captured = replace(prefill, flight=replace(INPUTS.flight, is_captured=True, prefilled=70))
    parts = named(captured)
    assert parts["captured steps"] == BASE["decoding or prefill"] and parts["prefill"] == 70 * 10_000
    assert named(replace(INPUTS, flight=replace(INPUTS.flight, shares=False)))["keys and values"] == 32 * 64 * 768


def test_reward_models_and_weights_of_the_step_are_added() -> None:
    more = named(replace(INPUTS, reward_models=77, step_bytes=1_000, step_kept=600))
    kept = {"memory kept for the weights of the step": 600, "weights of the step": 400}
    assert more == named(INPUTS) | {"reward models": 77} | kept
    assert named(replace(INPUTS, step_bytes=1_000)) == named(INPUTS) | {"weights of the step": 1_000}


def test_peaks_of_the_phases() -> None:
    always = 2 * (2 * 1_000_003) + (4 + 8 + 4) * 50_001
    assert peaks(memory_per_rank(INPUTS)) == {
        "rollout": always + BASE["keys and values"] + BASE["decoding or prefill"], "reference": always + 300_000,
        "update": always + 700_000 + 4 * 50_001, "optimizer": always + 4 * 50_001,
    }  # fmt: skip
