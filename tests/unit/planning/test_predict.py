"""What is counted of a step's packs, and of the weights that decoding stores again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_config import config_of

from grpo_dist.config.schema import ModelConfig, RolloutConfig, TrainConfig
from grpo_dist.model.config_files import load_model_config
from grpo_dist.planning.memory import ModelCounts
from grpo_dist.planning.predict import Predictor, packs_of_ranks
from grpo_dist.rollout.native import kernel
from grpo_dist.rollout.native.relaid import MOST_SPARE_BYTES

COUNTS = ModelCounts(parameters=1_000, adapters=50, adapted=800, grouped=700, joined=200, persistent=0, num_layers=3,
                     layer=290, cache_width=128, query_heads=8, vocabulary=500, quantized=600, quantized_bytes=310,
                     scale_bytes=77)  # fmt: skip
PLAIN = replace(COUNTS, quantized=0, quantized_bytes=0, scale_bytes=0)


@pytest.mark.parametrize(("ranks", "size", "groups"), [(4, 1, 4), (4, 2, 2), (2, 2, 1), (1, 2, 1), (6, 2, 3)])
def test_ranks_that_divide_rows_have_one_share_of_the_packs(ranks: int, size: int, groups: int) -> None:
    config = config_of(train=TrainConfig(batch_size=6, max_tokens_per_pack=400, sequence_parallel_size=size))
    packs = packs_of_ranks(config, ranks, share_prompts=True)
    assert len(packs) == groups
    assert sum(len(completions) for each in packs for pack in each for _, completions in pack) == 6 * 4


def predictor(device: Any, dtype: str = "bfloat16", stored: str = "float32", **rollout: Any) -> Predictor:
    """Of a config that decodes enough sequences for weights to be merged."""
    config = config_of(rollout=RolloutConfig(group_size=4, max_completion_length=24, **rollout),
                       model=ModelConfig(dtype=dtype))  # type: ignore[arg-type] # fmt: skip
    model_config = copy.deepcopy(load_model_config(config.model))
    model_config.dtype = getattr(torch, stored)
    return Predictor(config, model_config, device)


@pytest.mark.parametrize(
    ("device", "dtype", "counts", "rollout", "expected"),
    [
        ("gpu", "bfloat16", PLAIN, {}, 2 * (200 + 50)),
        ("gpu", "float32", PLAIN, {}, 4 * (200 + 50)),
        ("gpu", "bfloat16", COUNTS, {}, 2 * (200 + 50)),
        ("gpu", "bfloat16", COUNTS, {"dequantize": False}, 0),
        ("gpu", "bfloat16", PLAIN, {"dequantize": False}, 2 * (200 + 50)),
        ("cpu", "float32", PLAIN, {}, 4 * 800),
        ("cpu", "bfloat16", PLAIN, {}, 0),  # nothing is merged in it
        ("cpu", "float32", COUNTS, {}, 77),
        ("cpu", "float32", COUNTS, {"dequantize": False}, 77),
    ],
)
def test_weights_that_decoding_stores_again(
    device: str, dtype: str, counts: ModelCounts, rollout: dict[str, Any], expected: int
) -> None:
    """On a GPU those that are joined, and adapters; on a CPU those that are merged, or the scales of codes."""
    assert predictor(device, dtype, **rollout)._step_bytes(counts) == expected


@pytest.mark.parametrize(
    ("dtype", "stored", "parameters", "expected"),
    [
        ("float32", "bfloat16", 1 << 20, 2 << 20),
        ("float32", "bfloat16", 1 << 30, 2 << 30),
        ("float32", "float32", 1 << 20, 4 * 800),  # these are merged
        ("bfloat16", "bfloat16", 1 << 20, 2 << 20),
        ("bfloat16", "float32", 1 << 29, 1 << 30),
        ("bfloat16", "bfloat16", (1 << 29) + 1, 0),  # not kept, and therefore not made
    ],
)
def test_few_sequences_read_compact_weights(
    monkeypatch: pytest.MonkeyPatch, dtype: str, stored: str, parameters: int, expected: int
) -> None:
    assert predictor("cpu", dtype, stored)._step_kept(PLAIN) <= MOST_SPARE_BYTES
    monkeypatch.setattr(kernel, "FEW_SEQUENCES", 10_000)
    few = predictor("cpu", dtype, stored)
    assert few._step_bytes(replace(PLAIN, parameters=parameters)) == expected
    is_merged = (dtype, stored) == ("float32", "float32")
    assert few._step_kept(PLAIN) == (4 * 700 if is_merged else 2 * MOST_SPARE_BYTES)


def test_a_model_without_shared_prompts_stores_none_again() -> None:
    each_its_own = predictor("gpu")
    each_its_own.share_prompts = False
    assert each_its_own._step_bytes(PLAIN) == 0
