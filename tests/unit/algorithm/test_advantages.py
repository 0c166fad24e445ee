"""Advantages against a twin in plain loops over groups."""

from __future__ import annotations

import math
import statistics
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_dist.algorithm.advantages import (
    STD_FLOOR,
    discounted_sums,
    generalised_advantages,
    group_relative_advantages,
    group_statistics,
    overlong_punishment,
    relative_advantages,
    weighted_rewards,
    whiten,
)

pytestmark = pytest.mark.quick

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
NAN = math.nan
REWARD = st.one_of(st.just(NAN), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(-10, 10))


def naive(rewards: list[float], group: list[int], scale: Scale, baseline: Baseline = "mean") -> list[float]:
    """Group by group, with the statistics module."""
    means: dict[int, float] = {}
    stds: dict[int, float] = {}
    for g in set(group):
        scored = [r for r, other in zip(rewards, group, strict=True) if other == g and not math.isnan(r)]
        means[g] = statistics.fmean(scored) if scored else 0.0
        stds[g] = statistics.stdev(scored) if len(set(scored)) > 1 else 0.0
    centred = []
    for n, (r, g) in enumerate(zip(rewards, group, strict=True)):
        others = [o for m, (o, h) in enumerate(zip(rewards, group, strict=True)) if m != n and h == g and o == o]
        subtracted = means[g] if baseline == "mean" else statistics.fmean(others) if others else 0.0
        centred.append(0.0 if math.isnan(r) or stds[g] == 0 else r - subtracted)
    if scale == "none":
        return centred
    if scale == "group":
        return [c / (stds[g] + STD_FLOOR) for c, g in zip(centred, group, strict=True)]
    kept = [c for c, r in zip(centred, rewards, strict=True) if not math.isnan(r)]
    if len(kept) < 2:
        return centred
    return [c / (statistics.stdev(kept) + STD_FLOOR) for c in centred]


def compute(rewards: list[float], group: list[int], scale: Scale, baseline: Baseline = "mean") -> list[float]:
    """The function under test on lists."""
    result = group_relative_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(group), baseline, scale)
    assert result.dtype == torch.float64 and result.shape == (len(rewards),)
    return result.tolist()


@given(st.lists(st.tuples(REWARD, st.integers(0, 4)), min_size=1, max_size=24),
       st.sampled_from(["group", "batch", "none"]), st.sampled_from(["mean", "leave_one_out"]))  # fmt: skip
@settings(max_examples=150)
def test_advantages_are_those_of_a_plain_loop(pairs: list[tuple[float, int]], scale: Scale, baseline: Baseline) -> None:
    rewards, group = [r for r, _ in pairs], [g for _, g in pairs]
    assert compute(rewards, group, scale, baseline) == pytest.approx(
        naive(rewards, group, scale, baseline), rel=1e-6, abs=1e-7
    )


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
        torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), "leave_one_out", scale
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


def test_leaving_one_out_is_a_multiple_of_the_mean_baseline() -> None:
    by_mean = compute([1.0, 0.0, 0.25, 0.5], [0] * 4, "none")
    left_out = compute([1.0, 0.0, 0.25, 0.5], [0] * 4, "none", "leave_one_out")
    assert left_out == pytest.approx([a * 4 / 3 for a in by_mean])


# --- rewards at tokens ---------------------------------------------------------------------------------------------

LENGTHS, GROUP = torch.tensor([3, 1, 2, 4]), torch.tensor([0, 0, 1, 1])
OWNER = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]
LAST = [2, 3, 5, 9]


def at_ends(*columns: list[float]) -> torch.Tensor:
    """Outcome rewards (N, R) as rewards of the last tokens."""
    table = torch.full((10, len(columns)), NAN, dtype=torch.float64)
    table[LAST] = torch.tensor(columns, dtype=torch.float64).T
    return table


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_outcome_rewards_with_gamma_one_are_the_outcome_case(baseline: Baseline, scale: Scale) -> None:
    outcomes = [1.0, 0.25, NAN, 0.5]
    got = relative_advantages(at_ends(outcomes), [1.0], LENGTHS, GROUP, baseline=baseline, scale=scale,
                              normalise_each=False, gamma=1.0)  # fmt: skip
    expected = compute(outcomes, GROUP.tolist(), scale, baseline)
    assert got.tolist() == [expected[n] for n in OWNER]


def test_gamma_discounts_by_the_distance_to_the_reward() -> None:
    got = relative_advantages(at_ends([1.0, 0.0, 0.0, 3.0]), [2.0], LENGTHS, GROUP, baseline="mean", scale="none",
                              normalise_each=False, gamma=0.5)  # fmt: skip
    assert got.tolist() == pytest.approx([0.25, 0.5, 1.0, -1.0, -1.5, -3.0, 0.375, 0.75, 1.5, 3.0])


@given(st.data())
@settings(max_examples=80)
def test_process_rewards_equal_the_loop(data: st.DataObject) -> None:
    """DeepSeekMath, section 4.1.3: normalise every reward given in the group, then sum what is still to come."""
    rewards = [data.draw(st.sampled_from([NAN, 0.0, 0.5, 1.0, -2.0])) for _ in OWNER]
    gamma = data.draw(st.sampled_from([1.0, 0.9]))
    baseline = data.draw(st.sampled_from(["mean", "leave_one_out"]))
    table = torch.tensor(rewards, dtype=torch.float64)[:, None]
    got = relative_advantages(table, [1.0], LENGTHS, GROUP, baseline=baseline, scale="group", normalise_each=False,
                              gamma=gamma)  # fmt: skip
    for t, n in enumerate(OWNER):
        expected = 0.0
        for s in range(t, LAST[n] + 1):
            mates = [u for u in range(10) if GROUP[OWNER[u]] == GROUP[n] and rewards[u] == rewards[u]]
            given = [(rewards[u], OWNER[u]) for u in mates]
            if rewards[s] != rewards[s] or len({r for r, _ in given}) < 2:
                continue
            others = [r for r, owner in given if baseline == "mean" or owner != n]
            if others:
                std = statistics.stdev(r for r, _ in given)
                expected += gamma ** (s - t) * (rewards[s] - statistics.fmean(others)) / (std + STD_FLOOR)
        assert float(got[t]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_normalising_each_reward_keeps_apart_what_a_sum_would_merge() -> None:
    """GDPO's example: (1, 0) and (0, 1) sum to the same, and rewards of different ranges weigh the same."""
    right, short = [1.0, 0.0, 1.0, 0.0], [0.0, 10.0, 10.0, 0.0]
    both = relative_advantages(at_ends(right, short), [1.0, 1.0], LENGTHS, torch.zeros(4, dtype=torch.int64),
                               baseline="mean", scale="group", normalise_each=True, gamma=1.0)[LAST]  # fmt: skip
    alone = [compute(column, [0] * 4, "group") for column in (right, short)]
    summed = [a + b for a, b in zip(*alone, strict=True)]
    expected = [value / (statistics.stdev(summed) + STD_FLOOR) for value in summed]
    assert both.tolist() == pytest.approx(expected)


def test_weighted_rewards_leave_out_what_does_not_apply() -> None:
    table = torch.tensor([[1.0, 2.0, 7.0], [NAN, 2.0, 7.0], [NAN, NAN, 7.0]], dtype=torch.float64)
    assert weighted_rewards(table, [3.0, 0.5, 0.0])[:2].tolist() == [4.0, 1.0]
    assert weighted_rewards(table, [3.0, 0.5, 0.0])[2].isnan()


@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.floats(0, 1))
@settings(max_examples=60)
def test_discounted_sums_equal_the_loop(rows: list[list[float]], discount: float) -> None:
    got = discounted_sums(torch.tensor([v for row in rows for v in row], dtype=torch.float64),
                          torch.tensor([len(row) for row in rows]), discount)  # fmt: skip
    expected = [sum(v * discount**k for k, v in enumerate(row[t:])) for row in rows for t in range(len(row))]
    assert got.tolist() == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 6), st.floats(-3, 3)), min_size=1, max_size=5))
@settings(max_examples=40)
def test_an_outcome_is_that_of_each_of_its_tokens(outcomes: list[tuple[int, float]]) -> None:
    values = torch.tensor([v if t == length - 1 else 0.0 for length, v in outcomes for t in range(length)])
    got = discounted_sums(values.double(), torch.tensor([length for length, _ in outcomes]), 1)
    assert torch.equal(got, torch.tensor([v for length, v in outcomes for _ in range(length)]).double())


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (1.0, 0.0)])
def test_generalised_advantages_equal_the_definition(gamma: float, gae_lambda: float) -> None:
    """The exponentially weighted mean of all k-step estimates, which the recursion never forms."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    got, returns = generalised_advantages(rewards, values, LENGTHS, gamma, gae_lambda)
    for t, n in enumerate(OWNER):
        left = LAST[n] + 1 - t
        estimates = []
        for k in range(1, left + 1):
            bootstrap = gamma**k * float(values[t + k]) if k < left else 0.0
            estimates.append(sum(gamma**i * float(rewards[t + i]) for i in range(k)) + bootstrap - float(values[t]))
        shares = [(1 - gae_lambda) * gae_lambda ** (k - 1) for k in range(1, left)] + [gae_lambda ** (left - 1)]
        expected = sum(share * estimate for share, estimate in zip(shares, estimates, strict=True))
        assert float(got[t]) == pytest.approx(expected)
    assert torch.allclose(returns, got + values)


def test_whitening_counts_only_what_counts() -> None:
    values, counted = torch.tensor([1.0, 2.0, 3.0, 99.0]).double(), torch.tensor([True, True, True, False])
    assert whiten(values, counted).tolist() == pytest.approx([-1 / (1 + STD_FLOOR), 0.0, 1 / (1 + STD_FLOOR), 0.0])
    assert whiten(values, torch.tensor([True, False, False, False])).tolist() == [0.0] * 4
    two = whiten(torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64), torch.tensor([True, True, False])).tolist()
    assert two == pytest.approx([-1 / (2**0.5 + STD_FLOOR), 1 / (2**0.5 + STD_FLOOR), 0.0])


def test_overlong_punishment() -> None:
    lengths = torch.tensor([1, 6, 7, 8, 10])
    assert overlong_punishment(lengths, 10, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]


def test_no_completions_have_no_groups() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert [len(each) for each in group_statistics(nothing, torch.zeros(0, dtype=torch.int64))] == [0, 0, 0]


def test_two_scored_completions_have_a_scale() -> None:
    scale = math.sqrt(0.5) + STD_FLOOR
    assert compute([1.0, 0.0, NAN], [0, 0, 1], "batch") == pytest.approx([0.5 / scale, -0.5 / scale, 0.0])
    advantages = relative_advantages(
        torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64), [1.0, 1.0], torch.tensor([1, 1]),
        torch.tensor([0, 0]), baseline="mean", scale="none", normalise_each=True, gamma=1.0,
    )  # fmt: skip
    assert advantages.tolist() == pytest.approx([0.5 / scale, -0.5 / scale])


def test_an_unscored_reward_is_no_part_of_its_completion() -> None:
    rewards = torch.tensor([1.0, NAN, 3.0], dtype=torch.float64)
    advantages = group_relative_advantages(
        rewards, torch.zeros(3, dtype=torch.int64), "leave_one_out", "none", torch.tensor([0, 0, 1])
    )
    assert advantages.tolist() == [-2.0, 0.0, 2.0]


def test_completions_of_one_token_keep_their_order() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.equal(discounted_sums(values, torch.tensor([1, 1, 1]), 1.0), values)


def test_one_scored_completion_has_no_scale() -> None:
    """The std of one number is undefined: rewards that are normalised each leave it at 0."""
    rewards = torch.tensor([[1.0, 2.0], [math.nan, math.nan]], dtype=torch.float64)
    advantages = relative_advantages(
        rewards, [1.0, 1.0], torch.tensor([1, 1]), torch.tensor([0, 0]), baseline="mean", scale="group",
        normalise_each=True, gamma=1.0,
    )  # fmt: skip
    assert advantages.tolist() == [0.0, 0.0]


def test_a_reward_of_weight_0_is_no_part_of_a_scale() -> None:
    """Neither its values nor the tokens at which it alone was given."""
    outcomes = torch.tensor([[NAN], [1.0], [NAN], [0.0]], dtype=torch.float64)
    metric = torch.tensor([[5.0], [NAN], [7.0], [1.0]], dtype=torch.float64)
    lengths, group = torch.tensor([2, 2]), torch.tensor([0, 0])
    alone, beside = (
        relative_advantages(rewards, weights, lengths, group, baseline="mean", scale="group", normalise_each=True,
                            gamma=1.0).tolist()
        for rewards, weights in ((outcomes, [1.0]), (torch.cat([outcomes, metric], 1), [1.0, 0.0]))
    )  # fmt: skip
    assert alone == beside
