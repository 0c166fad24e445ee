"""The reference of the KL term: the base model as it was before training."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .packing import Pack
from .policy import Policy


class Reference(Protocol):
    """What the policy is kept near to."""

    policy: Policy

    def logprobs(self, pack: Pack) -> Tensor:
        """Log-probabilities (M,) of a pack; a collective under ZeRO-3 where the weights are the policy's."""


class FrozenCopy:
    """The base model in weights of its own."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        self.policy = Policy(model.eval().requires_grad_(False), temperature)

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """See `Reference`."""
        return self.policy(pack)[0]


class AdaptersOff:
    """The policy with its adapters off: no weights of its own."""

    def __init__(self, wrapped: Any, policy: Policy) -> None:
        self.wrapped, self.policy = wrapped, policy

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """See `Reference`."""
        with self.policy.model.disable_adapter():
            return self.wrapped(pack)[0]
