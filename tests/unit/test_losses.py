"""Losses against a twin in plain loops over tokens, and gradients against finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_dist.losses import k3, policy_loss, squared_sequence, token_weights

LENGTHS = [3, 1, 4]
SEQUENCE = [0, 0, 0, 1, 2, 2, 2, 2]
CASES: list[dict[str, Any]] = [
    {"objective": "grpo", "kl_estimator": "k3", "kl_coeff": 0.0},
    {"objective": "grpo", "kl_estimator": "k3", "kl_coeff": 0.3},
    {"objective": "grpo", "kl_estimator": "squared_sequence", "kl_coeff": 0.3},
    {"objective": "reinforce", "kl_estimator": "squared_sequence", "kl_coeff": 0.3},
    {"objective": "reinforce", "kl_estimator": "k3", "kl_coeff": 0.3},
]


def naive_loss(
    logprobs: list[float], old: list[float], reference: list[float], advantages: list[float], weights: list[float],
    sequence: list[int], objective: str, kl_estimator: str, kl_coeff: float, clip_low: float, clip_high: float,
) -> float:  # fmt: skip
    """The loss, one token after another."""
    total = 0.0
    for m, logprob in enumerate(logprobs):
        if objective == "grpo":
            ratio = math.exp(logprob - old[m])
            if advantages[m] >= 0:
                term = -min(ratio, 1 + clip_high) * advantages[m]
            else:
                term = -max(ratio, 1 - clip_low) * advantages[m]
        else:
            term = -advantages[m] * logprob
        if kl_estimator == "k3":
            difference = reference[m] - logprob
            kl = math.exp(difference) - difference - 1
        else:
            mine = [n for n in range(len(logprobs)) if sequence[n] == sequence[m]]
            kl = sum(logprobs[n] - reference[n] for n in mine) ** 2 / len(mine)
        total += weights[m] * (term + kl_coeff * kl)
    return total


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """Eight tokens of three completions in float64, with ratios on both sides of both clips."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(8, generator=generator, dtype=torch.float64) * 3
    shift = torch.tensor([0.6, -0.6, 0.02, -0.05, 0.7, -0.7, 0.1, -0.4], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -0.7, -1.2, -1.2, -1.2, -1.2], dtype=torch.float64)
    return {
        "logprobs": old + shift, "old": old,
        "reference": old + torch.randn(8, generator=generator, dtype=torch.float64) / 2,
        "advantages": advantages, "weights": torch.rand(8, generator=generator, dtype=torch.float64),
        "sequence": torch.tensor(SEQUENCE),
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clips", [(0.2, 0.2), (0.1, 0.5)])
def test_policy_loss_and_gradient_equal_the_loop(case: dict[str, Any], clips: tuple[float, float]) -> None:
    given_tensors = inputs()
    logprobs = given_tensors.pop("logprobs").requires_grad_()
    options = case | {"clip_low": clips[0], "clip_high": clips[1]}
    loss = policy_loss(logprobs, **given_tensors, **options)
    lists = {name: tensor.tolist() for name, tensor in given_tensors.items()}
    point = logprobs.tolist()
    assert float(loss.total.detach()) == pytest.approx(naive_loss(point, **lists, **options), rel=1e-12)
    assert float(loss.policy) == pytest.approx(naive_loss(point, **lists, **(options | {"kl_coeff": 0.0})), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    for m in range(8):
        step = [0.0] * 8
        step[m] = 1e-6
        above = naive_loss([p + s for p, s in zip(point, step, strict=True)], **lists, **options)
        below = naive_loss([p - s for p, s in zip(point, step, strict=True)], **lists, **options)
        assert float(gradient[m]) == pytest.approx((above - below) / 2e-6, rel=1e-6, abs=1e-8)


def test_without_a_reference_there_is_no_penalty() -> None:
    tensors = inputs() | {"reference": None}
    loss = policy_loss(**tensors, objective="grpo", clip_low=0.2, clip_high=0.2, kl_coeff=5.0, kl_estimator="k3")  # type: ignore[arg-type]
    assert float(loss.total.detach()) == float(loss.policy)
    assert loss.kl.tolist() == [0.0] * 8


def test_flags_say_which_clip_decided() -> None:
    tensors = inputs()
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "kl_coeff": 0.0, "kl_estimator": "k3"}
    logprobs = tensors.pop("logprobs").requires_grad_()
    loss = policy_loss(logprobs, **tensors, objective="grpo", **options)
    ratios = [math.exp(a - b) for a, b in zip(logprobs.tolist(), tensors["old"].tolist(), strict=True)]
    advantages = tensors["advantages"].tolist()
    assert loss.ratio.tolist() == pytest.approx(ratios)
    assert loss.clipped_low.tolist() == [r < 0.8 and a < 0 for r, a in zip(ratios, advantages, strict=True)]
    assert loss.clipped_high.tolist() == [r > 1.3 and a > 0 for r, a in zip(ratios, advantages, strict=True)]
    assert bool(loss.clipped_low.any()) and bool(loss.clipped_high.any())
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert torch.equal(gradient == 0, loss.clipped_low | loss.clipped_high)
    plain = policy_loss(logprobs, **tensors, objective="reinforce", **options)
    assert not bool(plain.clipped_low.any()) and not bool(plain.clipped_high.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_step_has_ratio_one_and_the_plain_policy_gradient(dtype: torch.dtype) -> None:
    logprobs = (-torch.rand(64) * 20).to(dtype).requires_grad_()
    advantages, weights = torch.randn(64).to(dtype), torch.rand(64).to(dtype)
    loss = policy_loss(logprobs, logprobs.detach(), logprobs.detach(), advantages, weights,
                       torch.zeros(64, dtype=torch.int64), objective="grpo", clip_low=0.2, clip_high=0.2,
                       kl_coeff=0.1, kl_estimator="k3")  # fmt: skip
    assert bool((loss.ratio == 1).all())
    assert bool((loss.kl == 0).all())
    assert not bool(loss.clipped_low.any()) and not bool(loss.clipped_high.any())
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert torch.allclose(gradient, -advantages * weights)


def test_only_the_total_is_differentiable() -> None:
    tensors = inputs()
    tensors["logprobs"].requires_grad_()
    loss = policy_loss(**tensors, objective="grpo", clip_low=0.2, clip_high=0.2, kl_coeff=0.1, kl_estimator="k3")
    assert loss.total.requires_grad
    assert not any(t.requires_grad for t in (loss.policy, loss.kl, loss.ratio, loss.clipped_low, loss.clipped_high))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_token_weights_equal_the_loop(lengths: list[int]) -> None:
    num_tokens, num_sequences = sum(lengths), len(lengths)
    expected = {
        "sequence_mean": [1 / (num_sequences * length) for length in lengths for _ in range(length)],
        "token_mean": [1 / num_tokens] * num_tokens,
        "sequence_sum": [1 / num_sequences] * num_tokens,
    }
    for aggregation, values in expected.items():
        weights = token_weights(torch.tensor(lengths), aggregation)  # type: ignore[arg-type]
        assert weights.dtype == torch.float32
        assert weights.tolist() == pytest.approx(values)


@given(st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32)), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_k3_equals_its_formula(pairs: list[tuple[float, float]]) -> None:
    logprobs, reference = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    expected = [math.expm1(r - p) - (r - p) for p, r in pairs]
    assert k3(logprobs, reference).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_k3_is_never_negative() -> None:
    """Near 0 the estimate is d² / 2, far below the rounding of exp(d) - d - 1 in float32."""
    differences = torch.cat([torch.logspace(-7, 1, 4000), -torch.logspace(-7, 1, 4000)])
    estimates = k3(torch.zeros_like(differences), differences)
    assert float(estimates.min()) >= 0
    assert k3(torch.zeros(1), torch.zeros(1)).item() == 0


def test_squared_sequence_shares_the_square_out_evenly() -> None:
    tensors = inputs()
    logprobs, reference = tensors["logprobs"], tensors["reference"]
    penalty = squared_sequence(logprobs, reference, tensors["sequence"])
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        square = float((logprobs[part] - reference[part]).sum()) ** 2
        assert penalty[part].tolist() == pytest.approx([square / length] * length)
        start += length
    empty = torch.zeros(0)
    assert squared_sequence(empty, empty, torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("case", CASES)
def test_an_empty_pack_has_a_loss_of_zero_that_can_be_differentiated(case: dict[str, Any]) -> None:
    empty, sequence = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    parameter = torch.ones(3, requires_grad=True)
    loss = policy_loss(parameter[sequence], empty, empty, empty, empty, sequence, clip_low=0.2, clip_high=0.2, **case)
    loss.total.backward()
    assert float(loss.total.detach()) == 0 and parameter.grad is not None and parameter.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_a_sum_over_completions(case: dict[str, Any]) -> None:
    tensors = inputs()
    options = case | {"clip_low": 0.2, "clip_high": 0.2}
    whole = float(policy_loss(**tensors, **options).total)
    parts = 0.0
    for number in range(len(LENGTHS)):
        mine = tensors["sequence"] == number
        part = {name: tensor[mine] for name, tensor in tensors.items()} | {
            "sequence": torch.zeros(LENGTHS[number], dtype=torch.int64)
        }
        parts += float(policy_loss(**part, **options).total)
    assert parts == pytest.approx(whole, rel=1e-12)
