"""The optimizer of a run: torch's AdamW, bitsandbytes' 8-bit AdamW, or Muon."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import Config
from .critic import HEAD, parameter_groups
from .policy import Policy

MOMENTUM = 0.95
"""Share of the mean of gradients that stays in each step of Muon."""


def make_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters; `rate_share` of a group is in proportion to the schedule's rate."""
    optim, groups = config.optim, parameter_groups(policy, config.optim, config.critic)
    options: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    adamw: dict[str, Any] = options | {"betas": optim.betas}
    if optim.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **adamw)
    adamw["fused"] = True  # else a step takes as much memory again as what it trains, and several times as long
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    return _MuonAndAdamW(groups, _matrices(policy), options, adamw)


def _matrices(policy: Policy) -> set[nn.Parameter]:
    """The trained parameters for Muon: matrices, but not embeddings, the head, or the critic."""
    head = policy.causal_lm.get_output_embeddings()
    others = [module for module in policy.modules() if isinstance(module, nn.Embedding) or module is head]
    excluded = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    return {parameter for name, parameter in policy.named_parameters()
            if parameter.ndim == 2 and id(parameter) not in excluded and not name.startswith(HEAD)}  # fmt: skip


class _Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. An update is about as large as AdamW's (arXiv:2502.16982, section 2.2), so that one
    learning rate serves both.

    torch's own makes the update orthogonal in bfloat16. Where a gradient has a small rank, as those of adapters have,
    the other directions are then rounding, and differ by percents between one rank and two.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step with the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                mean = state["momentum_buffer"]
                mean.lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonal(parameter.grad.lerp(mean, MOMENTUM))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly U Vᵀ of a matrix U S Vᵀ, by five Newton-Schulz steps in its own dtype, whose coefficients are those of
    Muon (https://kellerjordan.github.io/posts/muon): singular values become 0.7 to 1.2."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for other parameters, as one optimizer."""

    def __init__(
        self, groups: list[dict[str, Any]], matrices: set[nn.Parameter], muon: dict[str, Any], adamw: dict[str, Any]
    ) -> None:
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self._parts: list[torch.optim.Optimizer] = []
        for is_muon in (True, False):
            some = [group | {"params": [p for p in group["params"] if (p in matrices) == is_muon]} for group in groups]
            some = [group for group in some if group["params"]]
            if some:
                self._parts.append(_Muon(some, **muon) if is_muon else torch.optim.AdamW(some, **adamw))
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of both."""
        groups = iter(self.param_groups)
        for part in self._parts:
            # whoever loads a state, as Accelerate does, replaces groups and state
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]
            part.step()
