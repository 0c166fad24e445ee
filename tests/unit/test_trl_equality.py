"""Promise 5: for equal inputs, each loss, its gradient and the advantages equal TRL 1.16's.

TRL's numbers were stored by tests/fixtures/make_trl_losses.py. Where TRL is installed (the extra `bench`), they
are made again and compared.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_dist.algorithm.advantages import relative_advantages
from grpo_dist.algorithm.losses import PackTokens, policy_loss, token_weights
from grpo_dist.algorithm.targets import ENTROPY_SLACK, highest
from grpo_dist.config.algorithm import Aggregation, LossConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
STORED = json.loads((FIXTURES / "trl_losses.json").read_text())
LENGTHS = torch.tensor(STORED["lengths"])
INSIDE = torch.arange(STORED["longest"]) < LENGTHS[:, None]
SAMPLED = INSIDE & torch.tensor(STORED["inputs"]["sampled"])
BASE = LossConfig(kl_coeff=0.0, kl_estimator="k3", importance_correction="none")
OURS: dict[str, tuple[LossConfig, Aggregation]] = {
    "grpo": (BASE, "sequence_mean"),
    "bnpo": (BASE, "token_mean"),  # the same on one rank
    "dr_grpo": (BASE, "constant"),
    "dapo": (BASE, "token_mean"),
    "cispo": (replace(BASE, objective="cispo", clip_low=1.0, clip_high=1.0), "token_mean"),  # TRL's 2.0
    "sapo": (replace(BASE, objective="sapo"), "sequence_mean"),
    "luspo": (replace(BASE, ratio_level="sequence"), "sequence_sum"),
    "gspo": (replace(BASE, ratio_level="sequence"), "sequence_mean"),
}


def flat(values: list[Any], inside: torch.Tensor = INSIDE) -> torch.Tensor:
    """A padded (6, 12) table without its padding."""
    return torch.tensor(values, dtype=torch.float64)[inside]


@pytest.mark.parametrize("name", STORED["cases"])
def test_loss_and_gradient_equal_trl(name: str) -> None:
    case, given = STORED["cases"][name], STORED["inputs"]
    objective, aggregation = OURS[case["loss_type"]]
    objective = replace(
        objective, kl_coeff=case.get("beta", 0.0), kl_unbiased=case.get("use_bias_correction_kl", False),
        dual_clip=case.get("delta"), clip_high=case.get("epsilon_high", objective.clip_high),
        ratio_level=case.get("importance_sampling_level", objective.ratio_level),
        entropy_coeff=case.get("entropy_coef", 0.0),
    )  # fmt: skip
    inside = SAMPLED if case.get("masked") else INSIDE
    lengths = inside.sum(1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    advantages = torch.tensor(given["advantages"], dtype=torch.float64)[sequence]
    entropies = flat(given["entropies"], inside).requires_grad_()
    if "top_entropy_quantile" in case:
        every = torch.ones_like(sequence, dtype=torch.bool)
        advantages = torch.where(highest(entropies.detach(), every, case["top_entropy_quantile"]), advantages, 0.0)
    if case.get("importance_weights"):
        advantages = advantages * flat(given["importance"], inside)
    weights = token_weights(lengths, aggregation, group=torch.arange(6), included=torch.ones(6, dtype=torch.bool),
                            longest=STORED["longest"]).double()  # fmt: skip
    logprobs = flat(given["logprobs"], inside).requires_grad_()
    reference = flat(given["reference"], inside) if objective.kl_coeff else None
    old = flat(given["old"], inside)
    tokens = PackTokens(sequence, weights, rollout=old, advantages=advantages, old=old, reference=reference)
    loss = policy_loss(objective, objective.kl_coeff, logprobs, entropies, tokens)
    assert loss.total.item() == pytest.approx(case["loss"], rel=1e-5)
    gradient, of_entropies = torch.autograd.grad(loss.total, [logprobs, entropies], allow_unused=True)
    expected = flat(case["gradient"], inside)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert float(expected.norm()) > 0.01
    assert (of_entropies is None) == ("entropy_gradient" not in case)
    if of_entropies is not None:
        assert torch.allclose(of_entropies, flat(case["entropy_gradient"], inside), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", STORED["advantages"])
def test_advantages_equal_trl(name: str) -> None:
    """Of rewards of which some functions, or all, gave None."""
    aggregation, scale = name.split(", ")
    rewards = torch.tensor(STORED["rewards"], dtype=torch.float64)
    num, size = len(rewards), STORED["group_size"]
    ours = relative_advantages(
        rewards, STORED["reward_weights"], torch.ones(num, dtype=torch.int64), torch.arange(num) // size,
        baseline="mean", normalise_each=aggregation == "normalize_then_sum", gamma=1.0,
        scale="group" if aggregation == "normalize_then_sum" else scale,
    )  # fmt: skip
    expected = torch.tensor(STORED["advantages"][name], dtype=torch.float64)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert (expected.view(-1, size).abs() > 1e-6).sum(1).tolist() == [4, 3, 0, 0, 0]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra `bench`)")
def test_stored_numbers_are_what_trl_computes() -> None:
    assert metadata.version("trl") == STORED["trl"] == "1.16.0"
    spec = importlib.util.spec_from_file_location("make_trl_losses", FIXTURES / "make_trl_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.content()
    assert made["cases"].keys() == STORED["cases"].keys()
    for name, values in made["inputs"].items():
        made_again, stored = (torch.tensor(each, dtype=torch.float64) for each in (values, STORED["inputs"][name]))
        assert torch.allclose(made_again, stored, rtol=1e-12), name
    for name, values in made["advantages"].items():
        assert torch.allclose(torch.tensor(values), torch.tensor(STORED["advantages"][name]), rtol=1e-6), name
    for name, case in made["cases"].items():
        assert case["loss"] == pytest.approx(STORED["cases"][name]["loss"], rel=1e-12)
        for key in ("gradient", "entropy_gradient"):
            if key in case:
                assert torch.allclose(flat(case[key]), flat(STORED["cases"][name][key]), rtol=1e-10, atol=1e-14)


def test_equal_entropies_are_chosen_alike_whatever_their_rounding() -> None:
    entropies = torch.tensor([2.0, 1.0, 1.0 + ENTROPY_SLACK / 50, 1.0 - ENTROPY_SLACK / 50, 0.5, 3.0])
    counted = torch.tensor([True, True, True, True, True, False])
    assert highest(entropies, counted, 0.4).tolist() == [True, True, True, True, False, False]
    assert highest(entropies, counted, 1.0).tolist() == counted.tolist()
    assert highest(entropies, torch.zeros(6, dtype=torch.bool), 0.5).tolist() == [False] * 6
