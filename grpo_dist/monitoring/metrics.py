"""The metrics of a step, which recorder.py writes. Their names are stable: docs/metrics.md has all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..algorithm.advantages import has_spread
from ..rewards.scores import right_above
from ..types import Batch


def batch_metrics(batch: Batch, reward_names: list[str]) -> dict[str, float]:
    """Metrics of the global batch: rewards, advantages and lengths."""
    scored = batch.reward[~batch.reward.isnan()]
    lengths = batch.lengths.double()
    metrics = {
        "reward/mean": float(scored.mean()) if len(scored) else math.nan,
        "reward/std": float(scored.std()) if len(scored) > 1 else 0.0 if len(scored) else math.nan,
        "reward/groups_zero_std": float((~has_spread(batch.reward, batch.group)).double().mean()),
        "reward/unscored": float(batch.reward.isnan().double().mean()),
        "advantage/abs_mean": float(batch.first_advantages.abs().mean()),
        "completion/length_mean": float(lengths.mean()),
        "completion/length_max": float(lengths.max()),
        "completion/truncated": float((~batch.finished).double().mean()),
        "tokens/completion": float(lengths.sum()),
    }
    for name, column in zip(reward_names, batch.rewards.T, strict=True):
        present = column[~column.isnan()]
        metrics[f"reward/{name}/mean"] = float(present.mean()) if len(present) else math.nan
    return metrics | batch.scoring


def pass_rates(batch: Batch, weights: Sequence[float]) -> list[float]:
    """Share of right completions among the scored ones of each of the P prompts; NaN where none is scored."""
    zeros = torch.zeros(len(batch.prompts), dtype=torch.float64)
    right = zeros.index_add(0, batch.group, (batch.reward > right_above(weights)).double())
    return (right / zeros.index_add(0, batch.group, (~batch.reward.isnan()).double())).tolist()
