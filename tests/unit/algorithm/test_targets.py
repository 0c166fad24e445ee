"""From options to the numbers of a batch: who takes part, and what each token is pushed towards."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from option_groups import make_config

from grpo_dist.algorithm.kl import adapted_coefficient, kl_estimate
from grpo_dist.algorithm.ratios import importance_weights
from grpo_dist.algorithm.targets import (
    ENTROPY_SLACK,
    computed,
    highest,
    included,
    minibatch_of,
    needs_old_policy,
    next_kl_coeff,
    penalty_metrics,
    with_advantages,
)
from grpo_dist.checkpoint.state import TrainState
from grpo_dist.config.algorithm import LossConfig, has_reference
from grpo_dist.config.schema import Config, RewardConfig
from grpo_dist.data.order import Curriculum, Sampler
from grpo_dist.types import Batch, OldPolicy, Prompt, all_token_rewards, join

NAN = math.nan
LENGTHS = [3, 1, 2, 4, 2, 1]
GROUP = [0, 0, 0, 1, 1, 1]
OWNER = [n for n, length in enumerate(LENGTHS) for _ in range(length)]


def make_batch(rewards: list[float], *others: list[float], token_rewards: torch.Tensor | None = None) -> Batch:
    """Two groups of three completions; the third reward column and so on are `others`. The fourth is cut off."""
    columns = torch.tensor([rewards, *others], dtype=torch.float64).T
    return Batch(
        prompts=[Prompt(7, [1], "a"), Prompt(3, [1, 2], "b")], group=torch.tensor(GROUP),
        row_lengths=torch.tensor(LENGTHS), finished=torch.tensor([True, True, True, False, True, True]),
        ids=torch.arange(13), sampled=torch.ones(13, dtype=torch.bool),
        sampled_logprobs=-torch.ones(13), rewards=columns, reward=columns.sum(1), token_rewards=token_rewards,
        reference_logprobs=-torch.rand(13, generator=torch.Generator().manual_seed(1)),
    )  # fmt: skip


def make_old(seed: int = 0) -> OldPolicy:
    """Random log-probabilities, entropies and values."""
    generator = torch.Generator().manual_seed(seed)
    numbers = -torch.rand(3, 13, generator=generator)
    return OldPolicy(numbers[0], -numbers[1], numbers[2])


def advantages_of(config: Config, batch: Batch, old: OldPolicy | None = None, kl_coeff: float = 0.0) -> torch.Tensor:
    """The advantage of each token, (T,)."""
    weights = [reward.weight for reward in config.rewards]
    advantages = with_advantages(config, dataclasses.replace(batch, old=old), weights, kl_coeff).advantages
    assert advantages is not None
    return advantages


REWARDS = [1.0, 0.0, 0.5, 1.0, 1.0, 1.0]


# --- who takes part --------------------------------------------------------------------------------------------------


def test_unscored_completions_are_in_no_loss() -> None:
    batch = make_batch([1.0, NAN, 0.5, 1.0, 0.0, 1.0])
    assert included(make_config(), batch).tolist() == [True, False, True, True, True, True]
    assert included(make_config(loss__mask_truncated=True), batch).tolist() == [True, False, True, False, True, True]
    assert advantages_of(make_config(), batch)[3] == 0
    alone = advantages_of(make_config(advantage__baseline="none", advantage__scale="none"), batch)
    assert alone[2:5].tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(("kl_in", "kl_coeff"), [("loss", 0.0), ("loss", 0.1), ("reward", 0.1)])
def test_a_reference_is_needed_in_the_reward_or_by_a_term_of_the_loss(kl_in: str, kl_coeff: float) -> None:
    config = make_config(loss__kl_in=kl_in, loss__kl_coeff=kl_coeff)
    assert has_reference(config) is (kl_in == "reward" or kl_coeff > 0)
    if kl_in == "loss":
        assert penalty_metrics(config, make_batch(REWARDS)) == {}


def test_groups_without_variance_leave_the_denominators_only_where_asked() -> None:
    batch = make_batch(REWARDS)
    assert included(make_config(), batch).all()
    assert included(make_config(advantage__drop_zero_variance=True), batch).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, True, False, False, False, False]),  # the third completion is its group's mean
        ({"loss__kl_coeff": 0.1}, [True] * 6),
        ({"loss__entropy_coeff": 0.1}, [True] * 6),
        ({"loss__entropy_coeff": 0.1, "advantage__drop_zero_variance": True}, [True] * 3 + [False] * 3),
        ({"loss__top_entropy_quantile": 0.5}, [True] * 6),
        ({"advantage__baseline": "critic"}, [True] * 6),
        ({"advantage__baseline": "none", "advantage__scale": "none"}, [True, False, True, True, True, True]),
    ],
)
def test_only_what_can_teach_is_computed(options: dict[str, Any], expected: list[bool]) -> None:
    config, batch = make_config(**options), make_batch(REWARDS)
    if not needs_old_policy(config):
        batch = with_advantages(config, batch, [reward.weight for reward in config.rewards], 0.0)
    assert computed(config, batch).tolist() == expected


def test_minibatches_are_whole_prompts() -> None:
    batch = make_batch(REWARDS)
    assert minibatch_of(batch, 1).tolist() == [0] * 6
    assert minibatch_of(batch, 2).tolist() == GROUP


# --- advantages ------------------------------------------------------------------------------------------------------


def test_grpo_on_a_known_batch() -> None:
    advantages = advantages_of(make_config(), make_batch(REWARDS))
    expected = [0.5 / (0.5 + 1e-4), -0.5 / (0.5 + 1e-4), 0.0, 0.0, 0.0, 0.0]
    assert advantages.tolist() == pytest.approx([expected[n] for n in OWNER])


def test_a_penalty_in_the_reward_counts_once_a_completion_in_groups() -> None:
    config = make_config(advantage__baseline="leave_one_out", advantage__scale="none", loss__kl_coeff=0.3,
                         loss__kl_in="reward")  # fmt: skip
    batch, old = make_batch(REWARDS), make_old()
    difference = (old.logprobs - batch.reference_logprobs).tolist()
    lost = [sum(d for d, owner in zip(difference, OWNER, strict=True) if owner == n) for n in range(6)]
    shaped = [reward - 0.3 * kl for reward, kl in zip(REWARDS, lost, strict=True)]
    got = advantages_of(config, batch, old, 0.3)
    for t, n in enumerate(OWNER):
        others = [shaped[m] for m in range(6) if GROUP[m] == GROUP[n] and m != n]
        assert float(got[t]) == pytest.approx(shaped[n] - sum(others) / 2, rel=1e-5)
    assert penalty_metrics(config, dataclasses.replace(batch, old=old))["kl"] == pytest.approx(
        sum(difference) / 13, rel=1e-5
    )


def test_a_penalty_in_the_reward_is_each_tokens_without_groups() -> None:
    config = make_config(advantage__baseline="none", advantage__scale="none", loss__kl_coeff=0.3, loss__kl_in="reward",
                         loss__gamma=0.9, loss__kl_estimator="k2")  # fmt: skip
    batch, old = make_batch(REWARDS), make_old()
    penalties = ((old.logprobs - batch.reference_logprobs) ** 2 / 2).tolist()
    got = advantages_of(config, batch, old, 0.3)
    for t, n in enumerate(OWNER):
        after = [s for s in range(t, 13) if OWNER[s] == n]
        expected = sum(0.9 ** (s - t) * -0.3 * penalties[s] for s in after) + 0.9 ** (after[-1] - t) * REWARDS[n]
        assert float(got[t]) == pytest.approx(expected, rel=1e-5)


def test_without_groups_the_batch_is_whitened_by_token() -> None:
    config = make_config(advantage__baseline="none")
    got = advantages_of(config, make_batch([1.0, NAN, 0.5, 1.0, 0.0, 2.0]))
    scored = [t for t, n in enumerate(OWNER) if n != 1]
    assert float(got[3]) == 0
    assert float(got[scored].mean()) == pytest.approx(0, abs=1e-12)
    assert float(got[scored].std()) == pytest.approx(1, rel=1e-3)


def test_a_critic_with_lambda_one_is_reward_minus_value() -> None:
    config = make_config(advantage__baseline="critic", advantage__scale="none", critic__gae_lambda=1.0)
    old = make_old()
    batch = with_advantages(config, dataclasses.replace(make_batch(REWARDS), old=old), [1.0], 0.0)
    expected = torch.tensor([REWARDS[n] for n in OWNER]) - old.values
    assert batch.advantages is not None and torch.allclose(batch.advantages, expected.double(), atol=1e-6)
    assert batch.returns is not None and batch.returns.tolist() == pytest.approx([REWARDS[n] for n in OWNER])


def test_rewards_of_tokens_reach_the_tokens_before_them() -> None:
    table = torch.full((13, 1), NAN, dtype=torch.float64)
    table[[0, 2, 3, 5], 0] = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    table[6:, 0] = 0.5
    batch = make_batch([1.0, 0.0, 1.0, 2.0, 1.0, 0.5], token_rewards=table)
    got = advantages_of(make_config(advantage__scale="none"), batch)
    assert got.tolist() == [0.0, -0.5, -0.5, -0.5, 0.5, 0.5] + [0.0] * 7


def test_soft_overlong_punishment_is_a_reward_more() -> None:
    options = {"rollout__max_completion_length": 4, "advantage__overlong_buffer": 2, "advantage__overlong_penalty": 0.8}
    got = advantages_of(make_config(**options, advantage__scale="none"), make_batch([1.0] * 6))
    shaped = [1 - 0.4, 1.0, 1.0, 1 - 0.8, 1.0, 1.0]
    means = [sum(shaped[:3]) / 3, sum(shaped[3:]) / 3]
    assert got.tolist() == pytest.approx([shaped[n] - means[GROUP[n]] for n in OWNER])


def test_gdpo_tells_apart_what_sums_alike() -> None:
    config = make_config(advantage__several_rewards="normalise_then_sum")
    config.rewards = [RewardConfig("math"), RewardConfig("math")]
    batch = make_batch([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0, 3.0])
    got = advantages_of(config, batch)
    summed = advantages_of(dataclasses.replace(config, advantage=make_config().advantage), batch)
    assert float(got[0]) == pytest.approx(float(got[3])) and not torch.allclose(got, summed, rtol=0.05)


def test_only_tokens_of_high_entropy_are_pushed() -> None:
    config = make_config(loss__top_entropy_quantile=0.25)
    old, batch = make_old(), make_batch(REWARDS)
    got = advantages_of(config, batch, old)
    plain = advantages_of(make_config(), batch)
    chosen = old.entropies.argsort(descending=True)[:4]
    kept = torch.zeros(13, dtype=torch.bool)
    kept[chosen] = True
    assert torch.equal(got, torch.where(kept, plain, 0.0))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_highest_are_those_above_the_quantile(count: int, share: float) -> None:
    values = torch.randperm(count + 3, generator=torch.Generator().manual_seed(count)).double()
    counted = torch.arange(count + 3) >= 3
    threshold = float(np.quantile(values[counted].numpy(), 1 - share)) - 1e-9
    assert torch.equal(highest(values, counted, share), counted & (values >= threshold))
    assert highest(values, counted & False, share).tolist() == [False] * (count + 3)


def test_entropies_apart_by_rounding_are_equal() -> None:
    values = torch.tensor([1.0, 1.0 - ENTROPY_SLACK, 1.0 - 2 * ENTROPY_SLACK], dtype=torch.float64)
    assert highest(values, torch.tensor([True] * 3), 0.1).tolist() == [True, True, False]


# --- KL and rollout correction ---------------------------------------------------------------------------------------


def test_the_controller_moves_towards_the_target() -> None:
    assert adapted_coefficient(0.1, 0.02, 0.01) == pytest.approx(0.1 * 1.02)  # the error of 1 is bounded by 0.2
    assert adapted_coefficient(0.1, 0.0, 0.01) == pytest.approx(0.1 * 0.98)
    assert adapted_coefficient(0.1, 0.011, 0.01) == pytest.approx(0.1 * 1.01)
    config = make_config(loss__kl_coeff=0.1, loss__kl_target=0.01)
    assert next_kl_coeff(config.loss, 0.1, 0.02) == pytest.approx(0.102)
    assert next_kl_coeff(config.loss, 0.1, None) == 0.1
    assert next_kl_coeff(make_config().loss, 0.1, 3.0) == 0.1


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_estimators_have_the_gradient_of_the_kl(estimator: Any, unbiased: bool) -> None:
    """Summed over the vocabulary under the policy, the estimates' gradients are that of the KL itself."""
    generator = torch.Generator().manual_seed(5)
    logits, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    policy, other = torch.log_softmax(logits, 0), torch.log_softmax(reference, 0)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - other)).sum(), logits, retain_graph=True)
    estimates = kl_estimate(policy, other, torch.arange(6), estimator)
    ratio = (policy - policy.detach()).exp() if unbiased else 1.0
    (gradient,) = torch.autograd.grad((policy.exp().detach() * estimates * ratio).sum(), logits)
    assert torch.allclose(gradient, expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
def test_importance_weights_equal_the_loop(correction: Any, level: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    old, sampled = -torch.rand(2, 13, generator=generator, dtype=torch.float64)
    options = LossConfig(importance_correction=correction, importance_level=level, importance_low=0.7,
                         importance_high=1.3)  # fmt: skip
    got = importance_weights(options, old, sampled, torch.tensor(OWNER))
    for t, n in enumerate(OWNER):
        mine = [t] if level == "token" else [s for s in range(13) if OWNER[s] == n]
        ratio = math.exp(sum(float(old[s] - sampled[s]) for s in mine))
        expected = {"none": 1.0, "truncate": min(ratio, 1.3), "mask": ratio if 0.7 <= ratio <= 1.3 else 0.0}[correction]
        assert float(got[t]) == pytest.approx(expected)
    for bounds in ({"importance_low": 1.0}, {"importance_high": 1.0}):
        same = importance_weights(dataclasses.replace(options, **bounds), old, old, torch.tensor(OWNER))
        assert same.tolist() == [1.0] * 13, "the bounds are inside"
    none = torch.zeros(0, dtype=torch.int64)
    assert importance_weights(options, old[:0], old[:0], none).shape == (0,)


# --- batches that are joined, and positions that are saved -----------------------------------------------------------


def test_join_takes_groups_in_order() -> None:
    table = torch.full((13, 1), NAN, dtype=torch.float64)
    table[:, 0] = torch.arange(13)
    one, two = make_batch(REWARDS), make_batch([0.0, 0.25, 0.5, 0.75, 0.1, 0.2], token_rewards=table)
    both = join([one, two], [[0], [1, 0]])
    assert [prompt.index for prompt in both.prompts] == [7, 3, 7]
    assert both.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert both.lengths.tolist() == LENGTHS[:3] + LENGTHS[3:] + LENGTHS[:3]
    assert both.tokens.tolist() == [*range(6), *range(6, 13), *range(6)]
    assert both.reward.tolist() == [1.0, 0.0, 0.5, 0.75, 0.1, 0.2, 0.0, 0.25, 0.5]
    expected = torch.cat([all_token_rewards(one)[:6], table[6:], table[:6]])
    assert torch.equal(both.token_rewards.nan_to_num(-1), expected.nan_to_num(-1))
    assert join([one], [[0, 1]]).token_rewards is None
    assert join([one, two], [[], [1]]).reward.tolist() == [0.75, 0.1, 0.2]


@pytest.mark.parametrize("old", [None, make_old()])
def test_a_state_survives_its_checkpoint(old: OldPolicy | None) -> None:
    """Every field of it: what is not in the checkpoint is a function of what is."""
    batch = dataclasses.replace(make_batch(REWARDS), old=old, scoring={"rollout/rounds": 2.0}, extras={"a/b": [None]})
    order = Curriculum(Sampler(9, 2, 0), 9, 0.2, 0.8, 1)
    state = TrainState(4, 0.03, order)
    assert not state.tensors() and not state.is_start
    state.after_step(0.05, [0.5, 1.0])
    state.after_update(batch, {"loss": 1.0})
    again = TrainState(0, 0.1, Curriculum(Sampler(9, 2, 0), 9, 0.2, 0.8, 1))
    again.restore(state.tensors(), state.meta() | {"step": 5}, batch.prompts[::-1])
    assert again.meta() == state.meta() and again.step == 5 and again.updates == 1 and again.kl_coeff == 0.05
    assert again.sampler.batch_indices(5) == order.batch_indices(5) != Sampler(9, 2, 0).batch_indices(4)
    assert again.batch is not None and again.batch.prompts == batch.prompts
    for field in dataclasses.fields(Batch):
        value, other = getattr(batch, field.name), getattr(again.batch, field.name)
        if field.name != "old":
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert (again.batch.old is None) == (old is None)
    for field in dataclasses.fields(OldPolicy) if old is not None else ():
        assert torch.equal(getattr(again.batch.old, field.name), getattr(old, field.name))


def test_a_state_of_before_is_taken_up() -> None:
    """An older checkpoint has what dynamic sampling did apart from the batch's other metrics."""
    batch = dataclasses.replace(make_batch(REWARDS), scoring={"reward/math/failed": 0.0})
    state = TrainState(4, 0.03, Sampler(9, 2, 0))
    state.after_update(batch, {"loss": 1.0})
    again = TrainState(0, 0.1, Sampler(9, 2, 0))
    tensors = {name: tensor for name, tensor in state.tensors().items() if not name.startswith("batch/prompt_")}
    again.restore(tensors, state.meta() | {"step": 4, "facts": {"rollout/rounds": 2}}, batch.prompts)
    assert again.batch is not None and again.batch.prompts == batch.prompts
    assert again.batch is not None and again.batch.scoring == {"rollout/rounds": 2, "reward/math/failed": 0.0}
