"""The metrics of an update: sums over its packs, reduced over the ranks once at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithm.losses import Loss
from ..distributed.ranks import Ranks
from ..distributed.transfer import to_device
from ..model.packing import Pack
from ..monitoring.traces import traced_tokens
from ..types import Batch

NO_UPDATE: dict[str, float | None] = dict.fromkeys(
    ("kl", "entropy", "ratio/mean", "ratio/max", "clip/low", "clip/high", "rollout/kl", "rollout/logprob_gap_max",
     "tokens/useful_share")
) | dict.fromkeys(("loss", "loss/policy", "grad_norm", "learning_rate", "tokens/computed"), 0.0)  # fmt: skip
"""Metrics of a step without an update: all advantages were 0, so no forward pass and no optimizer step was made."""


class UpdateMetrics:
    """Sums over the packs of one update."""

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

    def add(self, total: Tensor, loss: Loss, pack: Pack, means: dict[str, Tensor]) -> None:
        """Add one pack, which is on the CPU; nothing here waits for the device.

        `total` is the loss that is differentiated. `means` are (M,) tensors whose mean over all tokens is a metric; all
        packs of all ranks have the same names. `means["entropy"]` is traced.
        """
        gap, token = loss.gap.double(), pack.token
        self.losses += torch.stack([total.detach().double(), loss.policy.double()])
        self.counts += torch.tensor([loss.ratio.numel(), pack.useful, len(pack.ids)], dtype=torch.float64)
        if loss.importance is not None:
            means = means | {"importance/mean": loss.importance, "importance/masked": loss.importance == 0}
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

    def reduced(self, ranks: Ranks) -> dict[str, float]:
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
