"""The optimizer of a run: torch's AdamW, bitsandbytes' 8-bit AdamW, or torch's Muon."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config.checks import require
from ..config.schema import Config, OptimConfig
from .critic import HEAD, parameter_groups
from .policy import Policy

SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}
"""What Accelerate's launcher sets where ranks have parts of the optimizer's state."""


def require_optimizer(optim: OptimConfig, environment: Mapping[str, str]) -> None:
    """Raise ValueError for an optimizer that is not installed, or that cannot do its work in parts.

    Muon makes a matrix orthogonal and 8-bit moments have a scale for each 256 numbers: on parts of a weight, the result
    would depend on the number of ranks.
    """
    name = optim.optimizer
    if name == "adamw":
        return
    sharding = [kind for variable, kind in SHARDED.items() if environment.get(variable, "").lower() in ("true", "1")]
    require(not sharding, "optim.optimizer", name, f"adamw with {' and '.join(sharding)}, or DDP "
            "(accelerate_configs/ddp.yaml): it needs each weight in one piece")  # fmt: skip
    require(name != "muon" or hasattr(torch.optim, "Muon"), "optim.optimizer", name,
            f"adamw with torch {torch.__version__}, or torch 2.9, which has Muon")  # fmt: skip
    require(name != "adamw_8bit" or importlib.util.find_spec("bitsandbytes") is not None, "optim.optimizer", name,
            "bitsandbytes to be installed: pip install 'grpo_dist[quantized]'")  # fmt: skip


def make_optimizer(policy: Policy, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters; `rate_share` of a group is in proportion to the schedule's rate."""
    optim, groups = config.optim, parameter_groups(policy, config.optim, config.critic)
    options: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    adamw: dict[str, Any] = options | {"betas": optim.betas}
    if optim.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **adamw)
    adamw["fused"] = device.type == "cuda"  # else a step takes as much memory again as what it trains
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


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for other parameters, as one optimizer.

    Muon's rate is scaled so that an update is about as large as AdamW's (arXiv:2502.16982, section 2.2): one learning
    rate serves both.
    """

    def __init__(
        self, groups: list[dict[str, Any]], matrices: set[nn.Parameter], muon: dict[str, Any], adamw: dict[str, Any]
    ) -> None:
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self._parts: list[torch.optim.Optimizer] = []
        for is_muon in (True, False):
            some = [group | {"params": [p for p in group["params"] if (p in matrices) == is_muon]} for group in groups]
            some = [group for group in some if group["params"]]
            if some:
                self._parts.append(torch.optim.Muon(some, **muon, adjust_lr_fn="match_rms_adamw") if is_muon
                                   else torch.optim.AdamW(some, **adamw))  # fmt: skip
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of both."""
        groups = iter(self.param_groups)
        for part in self._parts:
            # whoever loads a state, as Accelerate does, replaces groups and state
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]
            part.step()
