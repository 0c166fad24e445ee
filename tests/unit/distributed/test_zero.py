"""ZeRO's options, before any model is loaded."""

from __future__ import annotations

import pytest

from grpo_dist.distributed.deepspeed import _require_known_options


def test_what_deepspeed_refuses_is_said_before_models_are_loaded() -> None:
    options = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    _require_known_options(options)
    options["zero_optimization"] = {"stage": 2, "overlap_com": True}
    with pytest.raises(ValueError, match=r"(?s)launch config: DeepSpeed refuses its options: .*overlap_com"):
        _require_known_options(options)
