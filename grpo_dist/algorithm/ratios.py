"""Probability ratios: of the policy to the old policy, and of the old policy to the rollout engine. Pure.

Shapes: M completion tokens of a pack; its completions, numbered from 0 by `sequence` (M,), are complete.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config.algorithm import LossConfig, RatioLevel
from .kl import sequence_sums


def policy_ratio(logprobs: Tensor, old: Tensor, sequence: Tensor, level: RatioLevel) -> Tensor:
    """Ratio of each token's probability under the policy to that under the old one: (M,); 1 where they are equal.

    The level `sequence` gives every token the ratio of its completion, the geometric mean of its tokens' ratios (GSPO,
    arXiv:2507.18071, eq. 7), with the token's own gradient (GSPO-token, eq. 14). The sum is the same where the tokens
    of a completion share an advantage, and it is right where they do not.
    """
    log_ratio = logprobs - old
    if level == "sequence":
        sums, lengths = sequence_sums(log_ratio.detach(), sequence)
        log_ratio = (sums / lengths)[sequence] + (logprobs - logprobs.detach())
    return log_ratio.exp()


def importance_weights(options: LossConfig, old: Tensor, sampled: Tensor, sequence: Tensor) -> Tensor:
    """Importance weight of each token, for completions that another distribution drew than the old policy's: (M,).

    With rollout.lag that is an older policy, with an engine that computes otherwise the rounded policy. The ratio of
    the old policy's probability (`old`) to the one with which it was drawn (`sampled`), of the token or of its
    completion (the product over its tokens). `truncate` cuts the ratio off at the upper bound (truncated importance
    sampling, TIS). `mask` keeps tokens or completions with a ratio outside the bounds out of the policy's loss (IcePop
    per token, masked importance sampling per sequence). https://fengyao.notion.site/off-policy-rl;
    https://ringtech.notion.site/icepop. Beside the ratio of an update it makes the decoupled objective of AReaL
    (arXiv:2505.24298, section 5.2), whose proximal policy is the old policy.
    """
    low, high = options.importance_low, options.importance_high
    if options.importance_correction == "none":
        return torch.ones_like(old)
    log_ratio = old - sampled
    if options.importance_level == "sequence":
        log_ratio = sequence_sums(log_ratio, sequence)[0][sequence]
    if options.importance_correction == "truncate":
        return log_ratio.clamp(max=math.log(high)).exp()
    ratio = log_ratio.exp()
    return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
