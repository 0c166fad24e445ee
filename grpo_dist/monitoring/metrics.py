"""The metrics of a step, which recorder.py writes. Their names are stable: docs/metrics.md has all of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithm.advantages import group_statistics
from ..algorithm.losses import Loss
from ..distributed.transfer import to_device
from ..types import Batch
from .json_lines import read_json_lines
from .traces import traced_tokens

log = logging.getLogger(__name__)


def batch_metrics(batch: Batch, reward_names: list[str]) -> dict[str, float]:
    """Metrics of the global batch: rewards, advantages and lengths."""
    scored = batch.reward[~batch.reward.isnan()]
    _, stds, counts = group_statistics(batch.reward, batch.group)
    lengths = batch.lengths.double()
    metrics = {
        "reward/mean": float(scored.mean()) if len(scored) else math.nan,
        "reward/std": float(scored.std()) if len(scored) > 1 else 0.0,
        "reward/groups_zero_std": float(((stds <= 1e-12) | (counts < 2)).double().mean()),
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


NO_UPDATE: dict[str, float | None] = dict.fromkeys(
    ("kl", "entropy", "ratio/mean", "ratio/max", "clip/low", "clip/high", "rollout/kl", "rollout/logprob_gap_max",
     "tokens/useful_share")
) | dict.fromkeys(("loss", "loss/policy", "grad_norm", "learning_rate", "tokens/computed"), 0.0)  # fmt: skip
"""Metrics of a step without an update: all advantages were 0, so no forward pass and no optimizer step was made."""


def is_right(reward: Tensor, weights: Sequence[float]) -> Tensor:
    """Whether rewards (N,) are above half of the positive weights' sum, (N,) bool; False for an unscored one."""
    return reward > sum(weight for weight in weights if weight > 0) / 2


def pass_rates(batch: Batch, weights: Sequence[float]) -> list[float]:
    """Share of right completions among the scored ones of each of the P prompts; NaN where none is scored."""
    zeros = torch.zeros(len(batch.prompts), dtype=torch.float64)
    right = zeros.index_add(0, batch.group, is_right(batch.reward, weights).double())
    return (right / zeros.index_add(0, batch.group, (~batch.reward.isnan()).double())).tolist()


class UpdateMetrics:
    """Sums over the packs of one update, which are reduced over the ranks once at its end."""

    LOSSES = ("loss", "loss/policy")
    COUNTS = ("tokens", "useful", "computed")
    MAXIMA = ("ratio/max", "rollout/logprob_gap_max")

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.trace, self.traced = batch.trace, traced_tokens(batch)
        # gap, entropy, and whether they are known
        self.seen = torch.zeros((len(self.traced), 3), dtype=torch.float64, device=device)
        self.losses = torch.zeros(len(self.LOSSES), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(self.COUNTS), dtype=torch.float64)  # on the CPU, which knows them
        self.maxima = torch.zeros(len(self.MAXIMA), dtype=torch.float64, device=device)
        self.means: dict[str, Tensor] = {}

    def add(
        self, total: Tensor, loss: Loss, gap: Tensor, token: Tensor, useful: int, computed: int,
        means: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Add one pack; nothing here waits for the device.

        `total` is the loss that is differentiated. `gap` (M,) is the trainer's log-probabilities minus the rollout's,
        `token` (M,), on the CPU, the places of the pack's tokens in the batch, and `means["entropy"]` is traced.
        `means` are (M,) tensors whose mean over all tokens is a metric; all packs of all ranks have the same names.
        """
        gap = gap.double()
        self.losses += torch.stack([total.detach().double(), loss.policy.double()])
        self.counts += torch.tensor([loss.ratio.numel(), useful, computed], dtype=torch.float64)
        # an estimate of KL(rollout ‖ trainer) that is never negative: k3 of http://joschu.net/blog/kl-approx.html
        means = means | {"kl": loss.kl, "rollout/kl": torch.expm1(gap) - gap, "ratio/mean": loss.ratio,
                         "clip/low": loss.clipped_low, "clip/high": loss.clipped_high}  # fmt: skip
        for name, values in means.items():
            self.means[name] = self.means.get(name, 0.0) + values.detach().double().sum()
        if loss.ratio.numel():
            self.maxima = torch.maximum(self.maxima, torch.stack([loss.ratio.double().max(), gap.abs().max()]))
        inside = ((token >= self.traced.start) & (token < self.traced.stop)).nonzero()[:, 0]
        if self.trace is not None and len(inside):
            rows, inside = to_device([token[inside] - self.traced.start, inside], self.seen.device)
            known = gap[inside], means["entropy"][inside].detach().double()
            self.seen[rows] = torch.stack([*known, torch.ones_like(known[0])], 1)

    def reduced(self, ranks: Any) -> dict[str, float]:
        """The metrics of the update over all ranks, and in the batch's trace what this pass was first to compute; a
        collective."""
        counts = to_device([self.counts], self.losses.device)
        sums = torch.cat([self.losses, *counts, torch.stack(list(self.means.values())), self.seen.flatten()])
        reduced = ranks.reduce(sums, "sum")
        named = dict(zip([*self.LOSSES, *self.COUNTS, *self.means], reduced.tolist(), strict=False))
        if self.trace is not None:
            seen = reduced[len(named) :].view_as(self.seen)
            new = (seen[:, 2] > 0) & self.trace[:, 0].isnan()
            self.trace[new] = seen[new, :2]
        maxima = dict(zip(self.MAXIMA, ranks.reduce(self.maxima, "max").tolist(), strict=True))
        tokens = max(named.pop("tokens"), 1.0)
        useful, computed = named.pop("useful"), named.pop("computed")
        for name in self.means:
            named[name] /= tokens
        return named | maxima | {"tokens/computed": computed, "tokens/useful_share": useful / max(computed, 1.0)}


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float | None]:
    """Metrics of a step: those of its last update, the largest gap to the rollout of all, and of the first one how near
    it is to the rollout."""
    if not updates:
        return NO_UPDATE
    name = "rollout/logprob_gap_max"
    largest = max(update[name] for update in updates)
    step = {**updates[-1], name: largest, "rollout/kl": updates[0].get("rollout/kl")}
    agreement = "rollout/router_agreement"
    return step | ({agreement: updates[0][agreement]} if agreement in updates[0] else {})


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `time/NAME`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add to `time/NAME`."""
        self.seconds[f"time/{name}"] = self.seconds.get(f"time/{name}", 0.0) + seconds


def read_history(directory: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl."""
    return read_json_lines(directory / "metrics.jsonl")
