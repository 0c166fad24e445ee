"""Rewards to advantages. Pure.

Each reward belongs to a token: an outcome reward to a completion's last token, a process reward to the token where it
was given. A completion without a reward (NaN: it could not be scored) takes no part: it is not in the means and stds of
its group and of the batch, and its own advantages are 0.

Shapes: N completions of P groups, T completion tokens in the order of the completions, R rewards, E numbers that they
gave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.algorithm import GroupBaseline, Scale
from ..types import repeated

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
    deviations = torch.where(scored, rewards - means[group], 0.0)
    stds = (group_sums(deviations**2, group, num_groups) / (counts - 1).clamp(min=1)).sqrt()
    return means, stds, counts


def has_spread(rewards: Tensor, group: Tensor) -> Tensor:
    """Whether a group's rewards differ: (P,) bool. The mean of equal numbers may be off by a rounding."""
    means, stds, _ = group_statistics(rewards, group)
    return stds > 1e-12 * means.abs().clamp(min=1)


def group_relative_advantages(
    rewards: Tensor, group: Tensor, baseline: GroupBaseline, scale: Scale, owner: Tensor | None = None
) -> Tensor:
    """Advantage of each reward relative to its group (DeepSeekMath, arXiv:2402.03300, sections 4.1.2 and 4.1.3).

    `rewards` (E,) float64 with NaN for unscored, `group` (E,) int64, and `owner` (E,) int64: the completion of each
    reward; None where each has one of its own. The reward minus its group's mean (`mean`) or the mean of the other
    completions' rewards (`leave_one_out`; RLOO, arXiv:2402.14740), divided by the group's std
    (`group`), by the std of these differences over the batch (`batch`), or by nothing (`none`). Returns (E,) float64,
    exactly 0 in groups whose rewards are all equal.
    """
    means, stds, counts = group_statistics(rewards, group)
    scored = ~rewards.isnan()
    usable = scored & has_spread(rewards, group)[group]
    subtracted = means[group]
    if baseline == "leave_one_out":
        owner = torch.arange(len(rewards)) if owner is None else owner
        own_sums = torch.bincount(owner, weights=rewards.nan_to_num(0.0))[owner]
        others = counts[group] - torch.bincount(owner, weights=scored.double())[owner]
        subtracted = (means[group] * counts[group] - own_sums) / others.clamp(min=1)
        usable &= others > 0
    centred = torch.where(usable, rewards - subtracted, 0.0)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (stds[group] + STD_FLOOR)
    # differences from group means have mean 0 over the batch, so only their scale is normalised
    return centred / (centred[scored].std() + STD_FLOOR) if int(scored.sum()) > 1 else centred


def weighted_rewards(rewards: Tensor, weights: list[float]) -> Tensor:
    """Weighted sum of several rewards at each token: `rewards` (T, R) to (T,); NaN where a token has none."""
    rewards, weights = _counted(rewards, weights)
    summed = (rewards.nan_to_num(0.0) * torch.tensor(weights, dtype=rewards.dtype)).sum(1)
    return torch.where(rewards.isnan().all(1), torch.nan, summed)


def _counted(rewards: Tensor, weights: list[float]) -> tuple[Tensor, list[float]]:
    """The columns of `rewards` (T, R) with a weight other than 0, and these weights: the others are only metrics."""
    counted = [r for r, weight in enumerate(weights) if weight != 0]
    return rewards[:, counted], [weights[r] for r in counted]


def relative_advantages(
    rewards: Tensor, weights: list[float], lengths: Tensor, group: Tensor, *, baseline: GroupBaseline, scale: Scale,
    normalise_each: bool, gamma: float,
) -> Tensor:  # fmt: skip
    """Advantage of each token relative to its completion's group: (T,) float64.

    `rewards` (T, R) float64, NaN where a token has none; `weights` (R,); `lengths` and `group` (N,). Rewards are summed
    and then normalised, or with `normalise_each` normalised one by one, summed, and divided by the sums' std over the
    batch (GDPO, arXiv:2601.05242). A token's advantage is the sum of the normalised rewards from it on
    (DeepSeekMath, section 4.1.3), discounted by `gamma`. With outcome rewards and gamma 1 that is the outcome's
    normalised reward on every token.
    """
    owner = repeated(torch.arange(len(lengths)), lengths)
    columns = [(1.0, weighted_rewards(rewards, weights))]
    rewards, weights = _counted(rewards, weights)
    if normalise_each:
        columns = list(zip(weights, rewards.T, strict=True))
    normalised = torch.zeros(len(owner), dtype=torch.float64)
    for weight, column in columns:
        given = ~column.isnan()
        mine = owner[given]
        normalised[given] += weight * group_relative_advantages(column[given], group[mine], baseline, scale, mine)
    if normalise_each:
        given = ~rewards.isnan().all(1)
        if int(given.sum()) > 1:
            normalised /= normalised[given].std() + STD_FLOOR
    return discounted_sums(normalised, lengths, gamma)


def discounted_sums(values: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """Sum of the `values` (T,) from each token to its completion's end, each discounted by its distance: (T,)."""
    last = values[torch.cumsum(lengths, 0) - 1]
    # outcomes alone, which is the usual case: the result is that of the loop
    if discount == 1 and values.count_nonzero() == last.count_nonzero():
        return repeated(last, lengths)
    longest_first = lengths.argsort(descending=True)
    ends = torch.cumsum(lengths, 0)[longest_first]
    # how many completions have a token at this distance from the end
    counts = torch.flip(torch.cumsum(torch.flip(torch.bincount(lengths), [0]), 0), [0]).tolist()
    sums = values.clone()
    for distance, count in enumerate(counts[2:], 2):
        places = ends[:count] - distance
        sums[places] += discount * sums[places + 1]
    return sums


def whiten(values: Tensor, counted: Tensor) -> Tensor:
    """`values` (T,) shifted and scaled to mean 0 and std 1 over the `counted` ones (T,) bool; 0 elsewhere."""
    if int(counted.sum()) < 2:
        return torch.zeros_like(values)
    chosen = values[counted]
    return torch.where(counted, (values - chosen.mean()) / (chosen.std() + STD_FLOOR), 0.0)


def generalised_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the critic's targets (Schulman et al., arXiv:1506.02438, eq. 16).

    `rewards` and `values` (T,) float64: the reward of each token, and the critic's value of the text before it. After a
    completion's last token the value is 0, also where the length limit cut it: no reward follows. Returns advantages
    and advantages + values, both (T,).
    """
    following = torch.zeros_like(values)
    following[:-1] = values[1:]
    following[torch.cumsum(lengths, 0) - 1] = 0.0
    advantages = discounted_sums(rewards + gamma * following - values, lengths, gamma * gae_lambda)
    return advantages, advantages + values


def overlong_punishment(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13): (N,) float64, from 0 to -1 over the last `buffer` tokens.

    `lengths` (N,) are at most `longest`.
    """
    return ((longest - buffer - lengths).double() / buffer).clamp(max=0.0)
