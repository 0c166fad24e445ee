"""The learned critic: a value head on the policy's hidden states, with its own learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..config.schema import CriticConfig, OptimConfig

HEAD = "value_head"
"""Attribute of the policy for the head, and prefix of the names of its parameters."""


class ValueHead(nn.Module):
    """A linear map from hidden states to expected returns. It starts at 0 and computes in float32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (M,) of hidden states (M, H)."""
        return linear(hidden.float(), self.weight.float(), self.bias.float())[:, 0]


def parameter_groups(policy: nn.Module, optim: OptimConfig, critic: CriticConfig) -> list[dict[str, Any]]:
    """AdamW's groups: the policy with the schedule's learning rate, and the value head, if any, in proportion to it.

    `rate_share` is a group's learning rate divided by the schedule's.
    """
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if name.startswith(HEAD)]
    groups = [{"params": [p for name, p in trained.items() if not name.startswith(HEAD)], "rate_share": 1.0}]
    if head:
        groups.append({"params": head, "rate_share": critic.learning_rate / optim.learning_rate})
    return groups
