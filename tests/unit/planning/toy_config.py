"""Small configs of the toy model."""

from __future__ import annotations

from typing import Any

from grpo_dist.config.schema import Config, DataConfig, RolloutConfig, TrainConfig


def config_of(**changes: Any) -> Config:
    """The toy model with small counts, and whole groups of options changed."""
    given = {
        "data": DataConfig(max_prompt_length=40), "train": TrainConfig(batch_size=6, max_tokens_per_pack=400),
        "rollout": RolloutConfig(group_size=4, max_completion_length=24),
    } | changes  # fmt: skip
    return Config(**given)
