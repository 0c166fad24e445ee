"""From the options of an algorithm to the numbers of a batch: which completions take part, and each token's advantage.

Everything here is a function of the global batch, and therefore the same on every rank.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..config.algorithm import AUTO_IS_RESOLVED, LossConfig, has_groups, reference_in_loss
from ..config.schema import Config
from ..types import Batch, all_token_rewards, at_last_tokens
from .advantages import (
    discounted_sums,
    generalised_advantages,
    group_sums,
    has_spread,
    overlong_punishment,
    relative_advantages,
    weighted_rewards,
    whiten,
)
from .kl import adapted_coefficient, kl_estimate

_NEEDS_OLD = "the batch has no old policy yet, on which this depends"
ENTROPY_SLACK = 1e-5
"""Entropies (nats) that differ by less count as equal: far above float32's rounding, far below real differences."""


def needs_old_policy(config: Config) -> bool:
    """Whether advantages depend on the old policy's log-probabilities, entropies or values of the full batch."""
    return config.has_critic or config.loss.kl_in == "reward" or config.loss.top_entropy_quantile < 1


def included(config: Config, batch: Batch) -> Tensor:
    """Which completions are in the loss and its denominators: (N,) bool. Unscored ones never are."""
    counted = ~batch.reward.isnan()
    if config.loss.mask_truncated:
        counted &= batch.finished
    if config.advantage.drop_zero_variance:
        counted &= has_spread(batch.reward, batch.group)[batch.group]
    return counted


def computed(config: Config, batch: Batch) -> Tensor:
    """Which completions an update computes: (N,) bool; the others would add nothing to the gradient.

    The batch needs its advantages already, unless they depend on the old policy.
    """
    if needs_old_policy(config):
        return ~batch.reward.isnan()
    counted = included(config, batch)
    if reference_in_loss(config) or config.loss.entropy_coeff:
        return counted
    assert batch.advantages is not None
    nonzero = (batch.advantages != 0).double()
    return counted & (group_sums(nonzero, batch.sequence, len(batch.lengths)) > 0)


def with_advantages(config: Config, batch: Batch, reward_weights: list[float], kl_coeff: float) -> Batch:
    """The batch with the advantage of each token, and with the critic's returns where there is one.

    The batch needs its old policy where `needs_old_policy` says so. `kl_coeff` weights a KL penalty in the reward.
    """
    advantage, loss = config.advantage, config.loss
    rewards, weights = _rewards(config, batch, reward_weights)
    penalty = kl_penalty(config, batch)
    returns = None
    if has_groups(config):
        if penalty is not None:
            sums = group_sums(penalty, batch.sequence, len(batch.lengths))
            rewards, weights = torch.cat([rewards, _last_tokens_of_scored(batch, sums)], 1), [*weights, -kl_coeff]
        assert advantage.scale != "auto" and advantage.baseline in ("mean", "leave_one_out"), AUTO_IS_RESOLVED
        advantages = relative_advantages(
            rewards, weights, batch.lengths, batch.group, baseline=advantage.baseline, scale=advantage.scale,
            normalise_each=advantage.several_rewards == "normalise_then_sum", gamma=loss.gamma,
        )  # fmt: skip
    else:
        given = weighted_rewards(rewards, weights).nan_to_num(0.0)
        if penalty is not None:
            given = given - kl_coeff * penalty
        advantages, returns = _without_groups(config, batch, given)
    if loss.top_entropy_quantile < 1:
        assert batch.old is not None, _NEEDS_OLD
        counted = included(config, batch)[batch.sequence]
        advantages = torch.where(highest(batch.old.entropies, counted, loss.top_entropy_quantile), advantages, 0.0)
    return replace(batch, advantages=advantages, returns=returns)


def _rewards(config: Config, batch: Batch, weights: list[float]) -> tuple[Tensor, list[float]]:
    """The rewards of each token, NaN for unscored completions, and their weights; with the punishment of overlong
    completions where there is one: (T, R) or (T, R + 1)."""
    scored, buffer = ~batch.reward.isnan(), config.advantage.overlong_buffer
    rewards = torch.where(scored[batch.sequence, None], all_token_rewards(batch), torch.nan)
    if not buffer:
        return rewards, weights
    punishment = overlong_punishment(batch.row_lengths, config.rollout.max_completion_length, buffer)
    rewards = torch.cat([rewards, _last_tokens_of_scored(batch, punishment)], 1)
    return rewards, [*weights, config.advantage.overlong_penalty]


def _last_tokens_of_scored(batch: Batch, values: Tensor) -> Tensor:
    """Values (N,) of completions at their last tokens, NaN for unscored completions: (T, 1)."""
    return at_last_tokens(torch.where(batch.reward.isnan(), torch.nan, values)[:, None], batch.lengths)


def _without_groups(config: Config, batch: Batch, rewards: Tensor) -> tuple[Tensor, Tensor | None]:
    """Advantages from one reward of each token (T,), and the critic's returns where there is one."""
    gamma, returns = config.loss.gamma, None
    if config.has_critic:
        assert batch.old is not None and batch.old.values is not None, _NEEDS_OLD
        advantages, returns = generalised_advantages(rewards, batch.old.values.double(), batch.lengths, gamma,
                                                     config.critic.gae_lambda)  # fmt: skip
    else:
        advantages = discounted_sums(rewards, batch.lengths, gamma)
    counted = ~batch.reward.isnan()[batch.sequence]
    advantages = torch.where(counted, advantages, 0.0)
    return whiten(advantages, counted) if config.advantage.scale == "batch" else advantages, returns


def kl_penalty(config: Config, batch: Batch) -> Tensor | None:
    """KL estimate of each token where the penalty is in the reward: (T,) float64; else None."""
    if config.loss.kl_in == "loss":
        return None
    assert batch.old is not None and batch.reference_logprobs is not None, _NEEDS_OLD
    assert config.loss.kl_estimator != "auto", AUTO_IS_RESOLVED
    return kl_estimate(batch.old.logprobs, batch.reference_logprobs, batch.sequence, config.loss.kl_estimator).double()


def penalty_metrics(config: Config, batch: Batch) -> dict[str, float]:
    """The metric `kl` where the penalty is in the reward and not in the loss."""
    penalty = kl_penalty(config, batch)
    if penalty is None:
        return {}
    return {"kl": float(penalty[~batch.reward.isnan()[batch.sequence]].mean())}


def next_kl_coeff(loss: LossConfig, kl_coeff: float, kl: float | None) -> float:
    """The KL coefficient of the next step, from that of this step and its KL.

    `kl` is None where nothing was computed, and where the update was skipped because it was not finite.
    """
    if loss.kl_target is None or kl is None:
        return kl_coeff
    return adapted_coefficient(kl_coeff, kl, loss.kl_target)


def highest(values: Tensor, counted: Tensor, share: float) -> Tensor:
    """Which of the `counted` values (T,) are in the highest `share` of them, as arXiv:2506.01939 chooses tokens.

    All values equal to the last one are in. Tokens after the same text have the same entropy except for rounding, which
    depends on the pack. The slack keeps packing from choosing among them.
    """
    chosen = values[counted]
    if not len(chosen):
        return counted
    place = math.ceil((len(chosen) - 1) * (1 - share))  # the first at or above the (1 - share) quantile
    return counted & (values >= chosen.sort().values[place] - ENTROPY_SLACK)


def minibatch_of(batch: Batch, num_minibatches: int) -> Tensor:
    """The minibatch of each completion: (N,) int64; contiguous prompts, the same on every rank."""
    return batch.group * num_minibatches // len(batch.prompts)
