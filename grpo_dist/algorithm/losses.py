"""The loss of an update, on flat tensors of completion tokens. Pure.

Shapes: M completion tokens of a pack. Every function is linear in `weights` (M,), which contain the *global*
normalisation. The sum over all packs of all ranks is therefore the loss of the batch, however it was split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.algorithm import AUTO_IS_RESOLVED, Aggregation, LossConfig
from ..types import repeated
from .kl import kl_estimate
from .ratios import importance_weights, policy_ratio


@dataclass(frozen=True)
class PackTokens:
    """What the loss needs of a pack's M tokens beside what the policy computes; tensors (M,) on its device."""

    sequence: Tensor
    """int64: the pack's completions, numbered from 0."""
    weights: Tensor
    """From `token_weights`."""
    rollout: Tensor
    """Log-probabilities under the rollout engine (nats)."""
    advantages: Tensor
    old: Tensor | None
    """Log-probabilities under the policy that opened the batch; None where they are the current ones, detached."""
    reference: Tensor | None
    """Log-probabilities under the reference; None where the loss has no KL term."""
    values: Tensor | None = None
    """The critic's values under the policy that opened the batch."""
    returns: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """A pack's share of the loss, with the tensors of its metrics; only `total` is differentiable."""

    total: Tensor
    """Scalar: the value to differentiate."""
    policy: Tensor
    """Scalar: the part without KL penalty and entropy bonus."""
    kl: Tensor
    """(M,) KL estimate of each token; 0 without a reference."""
    ratio: Tensor
    """(M,) probability ratio of the policy to the old policy."""
    clipped_low: Tensor
    """(M,) bool: the lower clip decided."""
    clipped_high: Tensor
    """(M,) bool: the upper clip, or the dual clip, decided."""
    gap: Tensor
    """(M,) log-probability under the old policy minus that of the rollout (nats)."""
    importance: Tensor | None
    """(M,) weight of each advantage, from `importance_weights`; None without a correction."""


def token_weights(
    lengths: Tensor, aggregation: Aggregation, *, group: Tensor, included: Tensor, longest: int
) -> Tensor:
    """Weight of each token in the loss, from *all* completions that share an optimizer step: (T,) float32.

    `lengths`, `group` and `included` (N,): completions that are not included have weight 0 and are in no denominator.
    With n included completions of P prompts, T tokens in all and `longest` the length limit:
    sequence_mean: 1 / (n * length), the mean over sequences of their token means (GRPO); token_mean: 1 / T, the mean
    over all tokens (DAPO); constant: 1 / (n * longest) (Dr. GRPO, arXiv:2503.20783); prompt_mean: 1 / (P * the prompt's
    tokens), the mean over prompts of their token means; sequence_sum: 1 / n, the mean over sequences of token sums.
    """
    counted = torch.where(included, lengths, 0).double()
    num_sequences, num_tokens = included.sum().clamp(min=1).double(), counted.sum().clamp(min=1)
    ones = torch.ones_like(counted)
    if aggregation == "sequence_mean":
        per_token = ones / (num_sequences * lengths.clamp(min=1))
    elif aggregation == "token_mean":
        per_token = ones / num_tokens
    elif aggregation == "constant":
        per_token = ones / (num_sequences * longest)
    elif aggregation == "prompt_mean":
        num_groups = int(group.max()) + 1 if len(group) else 0
        per_group = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group, counted)
        per_token = 1 / ((per_group > 0).sum().clamp(min=1) * per_group.clamp(min=1))[group]
    else:
        per_token = ones / num_sequences
    return repeated(torch.where(included, per_token, 0.0), lengths).float()


def _clipped(ratio: Tensor, advantages: Tensor, options: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's clipped surrogate (DeepSeekMath, arXiv:2402.03300, eq. 3; DAPO, arXiv:2503.14476, eq. 8, for two clips).

    `dual_clip` also bounds the ratio where the advantage is negative (dual clip, arXiv:1912.09729).
    """
    low, high = 1 - options.clip_low, 1 + options.clip_high
    clipped_low = (ratio < low) & (advantages < 0)
    clipped_high = (ratio > high) & (advantages > 0)
    bounded = ratio
    if options.dual_clip is not None:
        bounded = ratio.clamp(max=options.dual_clip)
        clipped_high |= (ratio > options.dual_clip) & (advantages < 0)
    losses = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
    return losses, clipped_low, clipped_high


def _surrogate(
    logprobs: Tensor, ratio: Tensor, advantages: Tensor, options: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each token without penalties, and where its lower and upper clip decided: three (M,) tensors."""
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if options.objective == "grpo":
        return _clipped(ratio, advantages, options)
    if options.objective == "reinforce":  # Williams (1992)
        return -advantages * logprobs, never, never
    if options.objective == "cispo":  # MiniMax-M1, arXiv:2506.13585: the weight is clipped, and the gradient stays
        low, high = 1 - options.clip_low, 1 + options.clip_high
        weight = ratio.detach().clamp(low, high)
        return -weight * advantages * logprobs, ratio < low, ratio > high
    # SAPO, arXiv:2511.20347: a gate with slope 1 at ratio 1 that closes smoothly on both sides
    negative = torch.full_like(ratio, options.sapo_temperature_negative)
    temperature = torch.where(advantages > 0, options.sapo_temperature_positive, negative)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return -gate * advantages, never, never


def policy_loss(options: LossConfig, kl_coeff: float, logprobs: Tensor, entropies: Tensor, tokens: PackTokens) -> Loss:
    """Loss of one pack: the surrogate, plus `kl_coeff` times the KL penalty, minus `entropy_coeff` times the entropy.

    `kl_coeff` is the coefficient of this step: the controller of `kl_target` moves it away from `options.kl_coeff`.
    Log-probabilities and entropies (nats), both (M,), are the policy's, with gradient. With `kl_unbiased` the penalty
    is multiplied by the token's ratio, which makes its gradient that of the KL under the policy as it now is
    (DeepSeek-V3.2, arXiv:2512.02556).
    """
    sequence, weights = tokens.sequence, tokens.weights
    old = logprobs.detach() if tokens.old is None else tokens.old
    importance = importance_weights(options, old, tokens.rollout, sequence)
    ratio = policy_ratio(logprobs, old, sequence, options.ratio_level)
    per_token, low, high = _surrogate(logprobs, ratio, tokens.advantages * importance, options)
    policy = total = (per_token * weights).sum()
    kl = torch.zeros_like(logprobs)
    if tokens.reference is not None:
        assert options.kl_estimator != "auto", AUTO_IS_RESOLVED
        kl = kl_estimate(logprobs, tokens.reference, sequence, options.kl_estimator)
        penalty = kl * policy_ratio(logprobs, old, sequence, "token") if options.kl_unbiased else kl
        total = total + kl_coeff * (penalty * weights).sum()
    if options.entropy_coeff:
        total = total - options.entropy_coeff * (entropies * weights).sum()
    return Loss(total, policy.detach(), kl.detach(), ratio.detach(), low, high, gap=old - tokens.rollout,
                importance=None if options.importance_correction == "none" else importance)  # fmt: skip


def value_loss(values: Tensor, tokens: PackTokens, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the weighted squared error of the critic's values (M,), which have gradients; and the squared errors (M,).

    With `clip`, a value gains nothing by moving further than that from its old one. Implementations of PPO clip so;
    Schulman et al., arXiv:1707.06347, eq. 9, do not.
    """
    old, returns = tokens.values, tokens.returns
    assert old is not None and returns is not None, "with_old_policy and with_advantages fill them"
    counted = errors = (values - returns) ** 2
    if clip is not None:
        clipped = old + (values - old).clamp(-clip, clip)
        counted = torch.maximum(errors, (clipped - returns) ** 2)
    return (counted * tokens.weights).sum() / 2, errors
