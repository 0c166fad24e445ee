"""Configs from a few options."""

from __future__ import annotations

from typing import Any

from grpo_dist.config.algorithm import AdvantageConfig, CriticConfig, LossConfig
from grpo_dist.config.schema import Config, RolloutConfig, TrainConfig

CLASSES = {"loss": LossConfig, "advantage": AdvantageConfig, "critic": CriticConfig, "rollout": RolloutConfig,
           "train": TrainConfig}  # fmt: skip


def make_config(**options: Any) -> Config:
    """A config from `group__option=value`; without a KL term unless it is asked for."""
    groups: dict[str, dict[str, Any]] = {"loss": {"kl_coeff": 0.0}}
    for name, value in options.items():
        group, _, leaf = name.partition("__")
        groups.setdefault(group, {})[leaf] = value
    return Config(**{group: CLASSES[group](**values) for group, values in groups.items()})
