"""The reference of the KL term: the base model as it was before training."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..algorithm.targets import has_reference
from ..config.schema import Config
from .packing import Pack
from .policy import Policy

REFERENCE_PACK = 4
"""Tokens of a pack of the reference for each one of train.max_tokens_per_pack."""


class Reference(Protocol):
    """What the policy is kept near to."""

    policy: Policy

    def logprobs(self, pack: Pack) -> Tensor:
        """Log-probabilities (M,) of a pack; a collective under ZeRO-3 where the weights are the policy's."""


def needs_copy(config: Config, dtype: torch.dtype, copy_dtype: torch.dtype, zero_stage: int) -> bool:
    """Whether the reference has weights of its own beside a policy of a `dtype`: not where nothing depends on it, where
    `reference.placement` asks for the policy itself, and where the copy would have the same numbers as a base that
    every rank has."""
    is_same = copy_dtype == dtype and zero_stage < 3
    shares = config.lora is not None and (is_same or config.reference.placement == "shared")
    return has_reference(config) and not shares


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
