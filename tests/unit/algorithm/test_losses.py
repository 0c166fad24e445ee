"""Losses against a twin in plain loops over tokens, and gradients against finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_dist.algorithm.kl import kl_estimate, sequence_sums
from grpo_dist.algorithm.losses import Loss, PackTokens, policy_loss, token_weights, value_loss
from grpo_dist.config.algorithm import LossConfig

pytestmark = pytest.mark.quick

LENGTHS = [3, 1, 4]
SEQUENCE = [0, 0, 0, 1, 2, 2, 2, 2]
OBJECTIVE = LossConfig(kl_coeff=0.0, kl_estimator="k3", importance_correction="none")
CASES: list[LossConfig] = [
    OBJECTIVE,
    replace(OBJECTIVE, kl_coeff=0.3),
    replace(OBJECTIVE, kl_coeff=0.3, kl_estimator="squared_sequence", clip_low=0.1, clip_high=0.5),
    replace(OBJECTIVE, dual_clip=1.6, clip_high=0.5, kl_coeff=0.2, kl_estimator="abs"),
    replace(OBJECTIVE, kl_coeff=0.3, kl_unbiased=True, entropy_coeff=0.7),
    replace(OBJECTIVE, kl_coeff=0.3, kl_estimator="k1", kl_unbiased=True),
    replace(OBJECTIVE, objective="reinforce", kl_estimator="squared_sequence", kl_coeff=0.3),
    replace(OBJECTIVE, objective="reinforce", kl_estimator="k2", kl_coeff=0.3),
    replace(OBJECTIVE, objective="sapo", kl_coeff=0.1),
    replace(OBJECTIVE, objective="sapo", sapo_temperature_positive=2.0, sapo_temperature_negative=3.0),
]
DETACHED: list[LossConfig] = [
    replace(OBJECTIVE, objective="cispo", clip_low=1.0),
    replace(OBJECTIVE, objective="cispo", kl_coeff=0.3),
    replace(OBJECTIVE, ratio_level="sequence", clip_low=0.03, clip_high=0.04),
    replace(OBJECTIVE, ratio_level="sequence", objective="cispo"),
    replace(OBJECTIVE, ratio_level="sequence", objective="sapo", kl_coeff=0.3),
]
"""Objectives with parts that are not differentiated, which finite differences of the value therefore do not show."""


def loss_of(
    options: LossConfig, logprobs: Tensor, entropies: Tensor, old: Tensor, reference: Tensor | None,
    advantages: Tensor, weights: Tensor, sequence: Tensor, kl_coeff: float | None = None,
) -> Loss:  # fmt: skip
    """The loss at a coefficient, by default that of the options, of tokens that the old policy drew."""
    tokens = PackTokens(sequence, weights, rollout=old, advantages=advantages, old=old, reference=reference)
    return policy_loss(options, options.kl_coeff if kl_coeff is None else kl_coeff, logprobs, entropies, tokens)


def naive_kl(d: list[float], sequence: list[int], m: int, estimator: str) -> float:
    """One token's penalty from all log-ratios."""
    if estimator == "squared_sequence":
        mine = [n for n in range(len(d)) if sequence[n] == sequence[m]]
        return sum(d[n] for n in mine) ** 2 / len(mine)
    return {"k1": d[m], "k2": d[m] ** 2 / 2, "k3": math.exp(-d[m]) - 1 + d[m], "abs": abs(d[m])}[estimator]


def naive_loss(
    logprobs: list[float], entropies: list[float], old: list[float], reference: list[float], advantages: list[float],
    weights: list[float], sequence: list[int], o: LossConfig, frozen: list[float] | None = None,
) -> float:  # fmt: skip
    """The loss, one token after another; `frozen` are the log-probabilities where they are not differentiated."""
    total = 0.0
    frozen = logprobs if frozen is None else frozen
    for m, logprob in enumerate(logprobs):
        plain = ratio = math.exp(logprob - old[m])
        fixed = math.exp(frozen[m] - old[m])
        if o.ratio_level == "sequence":
            mine = [n for n in range(len(logprobs)) if sequence[n] == sequence[m]]
            fixed = math.exp(sum(frozen[n] - old[n] for n in mine) / len(mine))
            ratio = fixed * math.exp(logprob - frozen[m])
        if o.objective == "grpo" and advantages[m] >= 0:
            term = -min(ratio, 1 + o.clip_high) * advantages[m]
        elif o.objective == "grpo":
            term = -min(max(ratio, 1 - o.clip_low), o.dual_clip or math.inf) * advantages[m]
        elif o.objective == "reinforce":
            term = -advantages[m] * logprob
        elif o.objective == "cispo":
            term = -min(max(fixed, 1 - o.clip_low), 1 + o.clip_high) * advantages[m] * logprob
        else:
            tau = o.sapo_temperature_positive if advantages[m] > 0 else o.sapo_temperature_negative
            term = -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantages[m]
        kl = naive_kl([p - r for p, r in zip(logprobs, reference, strict=True)], sequence, m, o.kl_estimator)
        kl *= plain if o.kl_unbiased else 1
        total += weights[m] * (term + o.kl_coeff * kl - o.entropy_coeff * entropies[m])
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
        "sequence": torch.tensor(SEQUENCE), "entropies": torch.rand(8, generator=generator, dtype=torch.float64),
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES + DETACHED)
def test_policy_loss_and_gradient_equal_the_loop(case: LossConfig) -> None:
    tensors = inputs()
    logprobs, entropies = tensors["logprobs"].requires_grad_(), tensors["entropies"].requires_grad_()
    loss = loss_of(case, **tensors)
    lists = {name: tensor.tolist() for name, tensor in tensors.items() if name != "logprobs"}
    point = logprobs.tolist()
    assert loss.total.item() == pytest.approx(naive_loss(point, **lists, o=case), rel=1e-12)
    plain = replace(case, kl_coeff=0.0, entropy_coeff=0.0)
    assert float(loss.policy) == pytest.approx(naive_loss(point, **lists, o=plain), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.total, logprobs, retain_graph=True)
    for m in range(8):
        step = [0.0] * 8
        step[m] = 1e-6
        above = naive_loss([p + s for p, s in zip(point, step, strict=True)], **lists, o=case, frozen=point)
        below = naive_loss([p - s for p, s in zip(point, step, strict=True)], **lists, o=case, frozen=point)
        assert float(gradient[m]) == pytest.approx((above - below) / 2e-6, rel=1e-6, abs=1e-8)
    (by_entropy,) = torch.autograd.grad(loss.total, entropies, allow_unused=True)
    expected = -case.entropy_coeff * tensors["weights"]
    assert torch.allclose(torch.zeros(8).double() if by_entropy is None else by_entropy, expected)


def test_a_sequence_ratio_has_the_gradient_of_gspo() -> None:
    """Where a completion's tokens share advantage and weight, their own gradients add up to the geometric mean's."""
    tensors = inputs() | {"weights": torch.tensor([1 / 9] * 3 + [1 / 3] + [1 / 12] * 4, dtype=torch.float64)}
    tensors["advantages"] = torch.tensor([1.0] * 3 + [0.5] + [-2.0] * 4, dtype=torch.float64)
    logprobs = tensors["logprobs"].requires_grad_()
    got = loss_of(replace(OBJECTIVE, ratio_level="sequence", clip_low=0.9, clip_high=9.0), **tensors).total
    expected = torch.zeros((), dtype=torch.float64)
    for first, last in ((0, 3), (3, 4), (4, 8)):
        ratio = (logprobs[first:last] - tensors["old"][first:last]).mean().exp()
        expected = expected - ratio * tensors["advantages"][first] / 3
    assert got.item() == pytest.approx(expected.item())
    gradients = [torch.autograd.grad(value, logprobs)[0] for value in (got, expected)]
    assert torch.allclose(*gradients, rtol=1e-12)


def test_the_kl_coefficient_is_the_argument() -> None:
    """The option is where the coefficient begins; the controller of `kl_target` moves it."""
    adapted = loss_of(replace(OBJECTIVE, kl_coeff=9.0), **inputs(), kl_coeff=0.3)
    assert adapted.total.item() == loss_of(replace(OBJECTIVE, kl_coeff=0.3), **inputs()).total.item()


def test_without_a_reference_there_is_no_penalty() -> None:
    loss = loss_of(replace(OBJECTIVE, kl_coeff=5.0), **(inputs() | {"reference": None}))  # type: ignore[arg-type]
    assert float(loss.total) == float(loss.policy)
    assert loss.kl.tolist() == [0.0] * 8


def test_flags_say_which_clip_decided() -> None:
    tensors = inputs()
    objective = replace(OBJECTIVE, clip_high=0.3)
    logprobs = tensors["logprobs"].requires_grad_()
    loss = loss_of(objective, **tensors)
    ratios = [math.exp(a - b) for a, b in zip(logprobs.tolist(), tensors["old"].tolist(), strict=True)]
    advantages = tensors["advantages"].tolist()
    assert loss.ratio.tolist() == pytest.approx(ratios)
    assert loss.clipped_low.tolist() == [r < 0.8 and a < 0 for r, a in zip(ratios, advantages, strict=True)]
    assert loss.clipped_high.tolist() == [r > 1.3 and a > 0 for r, a in zip(ratios, advantages, strict=True)]
    assert bool(loss.clipped_low.any()) and bool(loss.clipped_high.any())
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert torch.equal(gradient == 0, loss.clipped_low | loss.clipped_high)
    for surrogate in ("reinforce", "sapo"):
        plain = loss_of(replace(objective, objective=surrogate), **tensors)
        assert not bool(plain.clipped_low.any()) and not bool(plain.clipped_high.any())
    cispo = loss_of(replace(objective, objective="cispo"), **tensors)
    assert cispo.clipped_low.tolist() == [r < 0.8 for r in ratios]
    assert cispo.clipped_high.tolist() == [r > 1.3 for r in ratios]
    dual = loss_of(replace(objective, dual_clip=1.5), **(tensors | {"advantages": -tensors["advantages"]}))
    assert bool(dual.clipped_high[0]) and ratios[0] > 1.5


@pytest.mark.parametrize("surrogate", ["grpo", "cispo"])
def test_flags_on_a_grid(surrogate: Any) -> None:
    """Neither a ratio that lies on a clip nor an advantage of 0 is clipped."""
    logs = [-1.0, -0.5, 0.0, 0.5, 1.0]
    points = [(log, advantage) for log in logs for advantage in (-2.0, -0.5, 0.0, 0.5, 2.0)]
    ratio, advantages = torch.tensor(points, dtype=torch.float64).T
    ones = torch.ones(len(points), dtype=torch.float64)
    for low, high, dual in ((0.0, 0.0, None), (0.3, 0.5, math.exp(0.5)), (0.3, 0.2, None), (0.0, 0.0, math.exp(0.5))):
        objective = replace(OBJECTIVE, objective=surrogate, clip_low=low, clip_high=high, dual_clip=dual)
        loss = loss_of(objective, ratio, ones, 0 * ones, None, advantages, ones, torch.arange(len(points)))
        signed = [(math.exp(log), a if surrogate == "grpo" else None) for log, a in points]
        is_low = [r < 1 - low and (a is None or a < 0) for r, a in signed]
        is_high = [r > 1 + high if a is None else (r > 1 + high and a > 0) or (dual is not None and r > dual and a < 0)
                   for r, a in signed]  # fmt: skip
        assert loss.clipped_low.tolist() == is_low and loss.clipped_high.tolist() == is_high


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", ["grpo", "reinforce", "cispo", "sapo"])
def test_first_step_has_ratio_one_and_the_plain_policy_gradient(surrogate: Any, level: Any, dtype: torch.dtype) -> None:
    logprobs = (-torch.rand(64) * 20).to(dtype).requires_grad_()
    advantages, weights = torch.randn(64).to(dtype), torch.rand(64).to(dtype)
    old = logprobs.detach()
    loss = loss_of(replace(OBJECTIVE, kl_coeff=0.1, objective=surrogate, ratio_level=level), logprobs, weights, old,
                       old, advantages, weights, torch.zeros(64, dtype=torch.int64))  # fmt: skip
    assert bool((loss.ratio == 1).all())
    assert bool((loss.kl == 0).all())
    assert not bool(loss.clipped_low.any()) and not bool(loss.clipped_high.any())
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert torch.allclose(gradient, -advantages * weights, rtol=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_advantages_are_weighted_by_importance() -> None:
    """Of the old policy to the rollout; the old policy of a single update is the current one, detached."""
    tensors, options = inputs(), replace(OBJECTIVE, importance_correction="truncate", importance_high=1.2)
    rollout = tensors["old"] - torch.linspace(-0.5, 0.5, 8).double()
    logprobs = tensors["logprobs"].requires_grad_()
    tokens = PackTokens(tensors["sequence"], tensors["weights"], rollout, tensors["advantages"], tensors["old"], None)
    importance = (tensors["old"] - rollout).exp().clamp(max=1.2)
    expected = loss_of(OBJECTIVE, **tensors | {"advantages": tensors["advantages"] * importance})
    loss = policy_loss(options, 0.0, logprobs, tensors["entropies"], tokens)
    assert torch.allclose(loss.total, expected.total) and torch.allclose(loss.importance, importance)
    assert torch.equal(loss.gap, tensors["old"] - rollout) and expected.importance is None
    first = policy_loss(options, 0.0, logprobs, tensors["entropies"], replace(tokens, old=None))
    assert bool((first.ratio == 1).all()) and torch.equal(first.gap, logprobs.detach() - rollout)
    assert not first.gap.requires_grad and not first.importance.requires_grad


def test_only_the_total_is_differentiable() -> None:
    tensors = inputs()
    tensors["logprobs"].requires_grad_()
    loss = loss_of(replace(OBJECTIVE, kl_coeff=0.1), **tensors)
    assert loss.total.requires_grad
    assert not any(t.requires_grad for t in (loss.policy, loss.kl, loss.ratio, loss.clipped_low, loss.clipped_high))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.booleans()), min_size=1, max_size=9))
@settings(max_examples=60)
def test_token_weights_equal_the_loop(rows: list[tuple[int, int, bool]]) -> None:
    inside = [(length, group) for length, group, counts in rows if counts]
    n, total = max(len(inside), 1), max(sum(length for length, _ in inside), 1)
    per_prompt = {g: sum(length for length, other in inside if other == g) for _, g in inside}
    one = {
        "sequence_mean": lambda length, group: 1 / (n * length),
        "token_mean": lambda length, group: 1 / total,
        "constant": lambda length, group: 1 / (n * 12),
        "prompt_mean": lambda length, group: 1 / (len(per_prompt) * per_prompt[group]),
        "sequence_sum": lambda length, group: 1 / n,
    }
    lengths, group, included = (torch.tensor(column) for column in zip(*rows, strict=True))
    for aggregation, weight in one.items():
        expected = [weight(length, g) if counts else 0.0 for length, g, counts in rows for _ in range(length)]
        got = token_weights(lengths, aggregation, group=group, included=included, longest=12)  # type: ignore[arg-type]
        assert got.dtype == torch.float32
        assert got.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_equals_the_loop(clip: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    values, old, returns, weights = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    expected = 0.0
    for v, o, r, w in zip(values.tolist(), old.tolist(), returns.tolist(), weights.tolist(), strict=True):
        clipped = v if clip is None else min(max(v, o - clip), o + clip)
        expected += w * max((v - r) ** 2, (clipped - r) ** 2) / 2
    tokens = PackTokens(torch.zeros(9).long(), weights, old, returns, old, None, values=old, returns=returns)
    loss, errors = value_loss(values, tokens, clip)
    assert loss.item() == pytest.approx(expected)
    assert torch.equal(errors, (values - returns) ** 2)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, tokens, clip)[0], values)


@given(st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32)), min_size=1, max_size=20))
@settings(max_examples=30)
def test_k3_equals_its_formula(pairs: list[tuple[float, float]]) -> None:
    logprobs, reference = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    expected = [math.expm1(r - p) - (r - p) for p, r in pairs]
    got = kl_estimate(logprobs, reference, torch.zeros(len(pairs), dtype=torch.int64), "k3")
    assert got.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_k3_is_never_negative() -> None:
    """Near 0 the estimate is d² / 2: far below the rounding of exp(d) - d - 1, and must not turn negative."""
    differences = torch.cat([torch.logspace(-7, 1, 4000), -torch.logspace(-7, 1, 4000)])
    sequence = torch.zeros(len(differences), dtype=torch.int64)
    estimates = kl_estimate(torch.zeros_like(differences), differences, sequence, "k3")
    assert float(estimates.min()) >= 0
    assert kl_estimate(torch.zeros(1), torch.zeros(1), sequence[:1], "k3").item() == 0


def test_squared_sequence_shares_the_square_out_evenly() -> None:
    tensors = inputs()
    logprobs, reference = tensors["logprobs"], tensors["reference"]
    penalty = kl_estimate(logprobs, reference, tensors["sequence"], "squared_sequence")
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        square = float((logprobs[part] - reference[part]).sum()) ** 2
        assert penalty[part].tolist() == pytest.approx([square / length] * length)
        start += length
    empty = torch.zeros(0)
    assert kl_estimate(empty, empty, torch.zeros(0, dtype=torch.int64), "squared_sequence").shape == (0,)


def test_sums_are_those_of_each_completion() -> None:
    sums, lengths = sequence_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1]))
    assert sums.tolist() == [1.0, 6.0, 0.0] and lengths.tolist() == [1.0, 2.0, 1.0]
    assert all(part.shape == (0,) for part in sequence_sums(torch.zeros(0), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("case", CASES + DETACHED)
def test_an_empty_pack_has_a_loss_of_zero_that_can_be_differentiated(case: LossConfig) -> None:
    empty, sequence = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    parameter = torch.ones(3, requires_grad=True)
    loss = loss_of(case, parameter[sequence], empty, empty, empty, empty, empty, sequence)
    loss.total.backward()
    assert float(loss.total.detach()) == 0 and parameter.grad is not None and parameter.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("case", CASES + DETACHED)
def test_the_loss_is_a_sum_over_completions(case: LossConfig) -> None:
    tensors = inputs()
    total = loss_of(case, **tensors).total.item()
    parts = 0.0
    for number in range(len(LENGTHS)):
        mine = tensors["sequence"] == number
        part = {name: tensor[mine] for name, tensor in tensors.items()}
        part["sequence"] = torch.zeros(LENGTHS[number], dtype=torch.int64)
        parts += float(loss_of(case, **part).total)
    assert parts == pytest.approx(total, rel=1e-12)
