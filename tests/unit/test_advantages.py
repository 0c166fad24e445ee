"""Advantages against a twin in plain loops over groups."""

from __future__ import annotations

import math
import statistics
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_dist.advantages import STD_FLOOR, group_relative_advantages, group_statistics

Scale = Literal["group", "batch", "none"]
NAN = math.nan
REWARD = st.one_of(st.just(NAN), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(-10, 10))


def naive(rewards: list[float], group: list[int], scale: Scale) -> list[float]:
    """Group by group, with the statistics module."""
    means: dict[int, float] = {}
    stds: dict[int, float] = {}
    for g in set(group):
        scored = [r for r, other in zip(rewards, group, strict=True) if other == g and not math.isnan(r)]
        means[g] = statistics.fmean(scored) if scored else 0.0
        stds[g] = statistics.stdev(scored) if len(set(scored)) > 1 else 0.0
    centred = [0.0 if math.isnan(r) or stds[g] == 0 else r - means[g] for r, g in zip(rewards, group, strict=True)]
    if scale == "none":
        return centred
    if scale == "group":
        return [c / (stds[g] + STD_FLOOR) for c, g in zip(centred, group, strict=True)]
    kept = [c for c, r in zip(centred, rewards, strict=True) if not math.isnan(r)]
    if len(kept) < 2:
        return centred
    return [c / (statistics.stdev(kept) + STD_FLOOR) for c in centred]


def compute(rewards: list[float], group: list[int], scale: Scale) -> list[float]:
    """The function under test on lists."""
    result = group_relative_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(group), scale)
    assert result.dtype == torch.float64 and result.shape == (len(rewards),)
    return result.tolist()


@given(
    st.lists(st.tuples(REWARD, st.integers(0, 4)), min_size=1, max_size=24), st.sampled_from(["group", "batch", "none"])
)
@settings(max_examples=60, deadline=None)
def test_equals_the_loop(pairs: list[tuple[float, int]], scale: Scale) -> None:
    rewards, group = [r for r, _ in pairs], [g for _, g in pairs]
    assert compute(rewards, group, scale) == pytest.approx(naive(rewards, group, scale), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6 + 0.1, -7.3])
def test_a_group_of_equal_rewards_gives_exactly_nothing(value: float, scale: Scale) -> None:
    rewards = [value] * 7 + [0.0, 1.0, 0.25]
    advantages = compute(rewards, [0] * 7 + [1] * 3, scale)
    assert advantages[:7] == [0.0] * 7
    assert all(a != 0 for a in advantages[7:])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_unscored_completion_takes_no_part(scale: Scale) -> None:
    with_gap = compute([1.0, NAN, 0.0, 0.5, 2.0, NAN], [0, 0, 0, 1, 1, 2], scale)
    without = compute([1.0, 0.0, 0.5, 2.0], [0, 0, 1, 1], scale)
    assert with_gap[1] == with_gap[5] == 0.0
    assert [with_gap[n] for n in (0, 2, 3, 4)] == pytest.approx(without)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_without_any_score_nothing_is_learnt(scale: Scale) -> None:
    assert compute([NAN, NAN], [0, 0], scale) == [0.0, 0.0]
    assert compute([3.0], [0], scale) == [0.0]
    assert group_relative_advantages(
        torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), scale
    ).shape == (0,)


def test_a_known_group() -> None:
    # mean 0.5, unbiased std sqrt(1/3)
    std = math.sqrt(1 / 3)
    assert compute([1.0, 0.0, 1.0, 0.0], [0] * 4, "group") == pytest.approx(
        [0.5 / (std + 1e-4), -0.5 / (std + 1e-4)] * 2, rel=1e-12
    )
    assert compute([1.0, 0.0, 1.0, 0.0], [0] * 4, "none") == [0.5, -0.5, 0.5, -0.5]


def test_statistics_of_groups() -> None:
    rewards = torch.tensor([1.0, 3.0, NAN, 5.0, NAN], dtype=torch.float64)
    means, stds, counts = group_statistics(rewards, torch.tensor([0, 0, 0, 2, 3]))
    assert means.tolist() == [2.0, 0.0, 5.0, 0.0]
    assert stds.tolist() == pytest.approx([math.sqrt(2), 0.0, 0.0, 0.0])
    assert counts.tolist() == [2.0, 0.0, 1.0, 0.0]


def test_order_does_not_matter() -> None:
    rewards, group = [0.3, 0.9, 0.1, 0.7, 0.2, 0.6], [0, 1, 0, 1, 0, 1]
    order = [3, 0, 5, 2, 1, 4]
    for scale in ("group", "batch", "none"):
        straight = compute(rewards, group, scale)
        shuffled = compute([rewards[n] for n in order], [group[n] for n in order], scale)
        assert shuffled == pytest.approx([straight[n] for n in order], rel=1e-12)
