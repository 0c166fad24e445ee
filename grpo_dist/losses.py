"""The objective of an update, on flat tensors of completion tokens. Pure.

Shapes: M completion tokens of a pack. Every function is linear in `weights` (M,), which carry the *global*
normalisation, so that the sum over all packs of all ranks is the loss of the whole batch however it was cut up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum"]


@dataclass(frozen=True)
class Loss:
    """A pack's share of the loss, and what is worth knowing about it (all detached but `total`)."""

    total: Tensor
    """Scalar to differentiate."""
    policy: Tensor
    """Scalar: the part without the KL penalty."""
    kl: Tensor
    """(M,) KL estimate of each token; 0 without a reference."""
    ratio: Tensor
    """(M,) probability ratio between the policy and the one that is being improved on."""
    clipped_low: Tensor
    """(M,) bool: the lower clip decided."""
    clipped_high: Tensor
    """(M,) bool: the upper clip decided."""


def token_weights(lengths: Tensor, aggregation: Aggregation) -> Tensor:
    """Weight of each token in the loss, from the lengths (N,) of *all* completions of the global batch: (T,) float32.

    sequence_mean: 1 / (N * length), the mean over sequences of their token means (GRPO); token_mean: 1 / T, the mean
    over all tokens (DAPO); sequence_sum: 1 / N, the mean over sequences of their token sums (REINFORCE).
    """
    num_sequences, num_tokens = max(len(lengths), 1), max(int(lengths.sum()), 1)
    per_sequence = {
        "sequence_mean": 1.0 / (num_sequences * lengths.clamp(min=1).double()),
        "token_mean": torch.full((len(lengths),), 1.0 / num_tokens, dtype=torch.float64),
        "sequence_sum": torch.full((len(lengths),), 1.0 / num_sequences, dtype=torch.float64),
    }[aggregation]
    return torch.repeat_interleave(per_sequence, lengths).float()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's low-variance KL estimate exp(d) - d - 1 with d = reference - policy: (M,), never negative.

    http://joschu.net/blog/kl-approx.html; DeepSeekMath, eq. 4.
    """
    difference = reference - logprobs
    return torch.expm1(difference) - difference  # exp(d) - 1 would round away all of a small difference


def squared_sequence(logprobs: Tensor, reference: Tensor, sequence: Tensor) -> Tensor:
    """The recipe's penalty: the square of a sequence's summed log-ratio, shared out evenly among its tokens: (M,).

    `sequence` (M,) int64 numbers the pack's completions from 0; a completion is never cut between packs.
    """
    num_sequences = int(sequence.max()) + 1 if len(sequence) else 0
    zeros = logprobs.new_zeros(num_sequences)
    sums = zeros.index_add(0, sequence, logprobs - reference)
    lengths = zeros.index_add(0, sequence, torch.ones_like(logprobs))
    return (sums**2 / lengths.clamp(min=1))[sequence]


def grpo(logprobs: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """GRPO's clipped surrogate for each token, to be minimised (DeepSeekMath, eq. 3): losses (M,) and ratios (M,)."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    sequence: Tensor,
    *,
    objective: Literal["grpo", "reinforce"],
    clip_low: float,
    clip_high: float,
    kl_coeff: float,
    kl_estimator: Literal["k3", "squared_sequence"],
) -> Loss:
    """Loss of one pack: the policy term plus `kl_coeff` times the KL penalty.

    All tensors (M,): log-probabilities (nats) under the policy (with gradient), under the policy that sampled or opened
    the batch (`old`), under the reference; advantages; weights from `token_weights`; and `sequence`, the pack's
    completions numbered from 0.
    """
    if objective == "grpo":
        per_token, ratio = grpo(logprobs, old, advantages, clip_low, clip_high)
        low = (ratio < 1 - clip_low) & (advantages < 0)
        high = (ratio > 1 + clip_high) & (advantages > 0)
    else:
        per_token, ratio = -advantages * logprobs, (logprobs - old).exp()
        low = high = torch.zeros_like(ratio, dtype=torch.bool)
    policy = (per_token * weights).sum()
    if reference is None:
        kl, total = torch.zeros_like(logprobs), policy
    else:
        kl = k3(logprobs, reference) if kl_estimator == "k3" else squared_sequence(logprobs, reference, sequence)
        total = policy + kl_coeff * (kl * weights).sum()
    return Loss(total, policy.detach(), kl.detach(), ratio.detach(), low, high)
