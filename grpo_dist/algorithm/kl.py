"""Estimates of the divergence between policy and reference at each token, and the controller of their weight. Pure.

Shapes: M completion tokens of a pack, or of any number of complete completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.algorithm import KlEstimator

CONTROLLER_GAIN = 0.1
CONTROLLER_BAND = 0.2
"""Ziegler et al., arXiv:1909.08593, section 2.2: K_beta, and the bound on the relative error."""


def kl_estimate(logprobs: Tensor, reference: Tensor, sequence: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate of KL(policy || reference) at each token, from tokens that the policy drew: (M,).

    With d = log policy - log reference: `k1` is d, unbiased and of high variance; `k2` is d²/2, whose plain gradient is
    the KL's; `k3` is exp(-d) - 1 + d, unbiased and never negative (http://joschu.net/blog/kl-approx.html; DeepSeekMath,
    eq. 4); `abs` is |d|; `squared_sequence` is the square of a completion's summed d, divided evenly among its tokens
    (the preset `reinforce`). `sequence` (M,) int64 numbers the completions, which are complete.
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference  # exp(-d) - 1 would round a small difference to 0
    if estimator == "abs":
        return difference.abs()
    sums, lengths = sequence_sums(difference, sequence)
    return (sums**2 / lengths)[sequence]


def sequence_sums(values: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `values` (M,) over each completion, and the completions' lengths: both (M,), where those of completion n
    are at place n. The places behind the last completion have the sum 0 and the length 1: results of M places need no
    number of completions, for which the host would wait for a GPU."""
    zeros = torch.zeros_like(values)
    lengths = zeros.index_add(0, sequence, torch.ones_like(values))
    return zeros.index_add(0, sequence, values), lengths.clamp(min=1)


def adapted_coefficient(coefficient: float, kl: float, target: float) -> float:
    """The coefficient after a step with the metric `kl`: raised where `kl` is above `target`, else lowered.

    Ziegler et al., arXiv:1909.08593, section 2.2, applied once a step.
    """
    error = min(max(kl / target - 1, -CONTROLLER_BAND), CONTROLLER_BAND)
    return coefficient * (1 + CONTROLLER_GAIN * error)
