"""Rewards to advantages, group by group. Pure.

A completion without a reward (NaN: it could not be scored) takes no part: it leaves the mean and the std of its group
and of the batch, and its own advantage is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to a std before dividing by it, as TRL does: rewards that differ by rounding alone must not become signal."""


def group_sums(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum of `values` (N,) within each group: (num_groups,)."""
    return torch.zeros(num_groups, dtype=values.dtype).index_add_(0, group, values)


def group_statistics(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased std and number of scored completions of each group: three (P,) tensors; 0 where undefined."""
    scored = ~rewards.isnan()
    num_groups = int(group.max()) + 1 if len(group) else 0
    counts = group_sums(scored.double(), group, num_groups)
    filled = rewards.nan_to_num(0.0)
    means = group_sums(filled, group, num_groups) / counts.clamp(min=1)
    deviations = torch.where(scored, rewards - means[group], 0.0).nan_to_num(0.0)
    stds = (group_sums(deviations**2, group, num_groups) / (counts - 1).clamp(min=1)).sqrt()
    return means, stds, counts


def group_relative_advantages(rewards: Tensor, group: Tensor, scale: Literal["group", "batch", "none"]) -> Tensor:
    """Advantage of each completion relative to its group (DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    `rewards` (N,) float64 with NaN for unscored, `group` (N,) int64. The reward minus the group's mean, divided by the
    group's std (`group`), by the std of these differences over the batch (`batch`), or by nothing (`none`). Returns
    (N,) float64, exactly 0 in groups whose rewards are all equal.
    """
    means, stds, _ = group_statistics(rewards, group)
    scored = ~rewards.isnan()
    # a mean of equal numbers may be off by a rounding: such a group must give 0, not noise
    spread = stds[group] > 1e-12 * means[group].abs().clamp(min=1)
    centred = torch.where(scored & spread, rewards - means[group], 0.0).nan_to_num(0.0)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (stds[group] + STD_FLOOR)
    # differences from group means have mean 0 over the batch, so only the scale is left to normalise
    return centred / (centred[scored].std() + STD_FLOOR) if int(scored.sum()) > 1 else centred
