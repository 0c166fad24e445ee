"""The reference of the KL term: the base model before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config.algorithm import has_reference
from ..config.schema import Config
from ..distributed.device import dtype_name
from .packing import Pack
from .peft import lora_layers, without_adapters
from .policy import Policy, PolicyOptions

REFERENCE_PACK = 4
"""Packs of the reference have this many times train.max_tokens_per_pack tokens."""


class Reference(Protocol):
    """The model that the KL term keeps the policy close to."""

    policy: Policy

    def logprobs(self, pack: Pack) -> Tensor:
        """Log-probabilities (M,) of a pack. A collective under ZeRO-3 and FSDP2 if the weights are the policy's."""


def needs_copy(config: Config, has_base: bool) -> bool:
    """Whether the reference needs its own weights. It does not if nothing uses it, if `reference.placement` shares the
    policy, or if the policy of every rank has the whole of its base (`has_base`)."""
    shares = has_base or config.reference.placement == "shared"
    return has_reference(config) and not (config.lora is not None and shares)


def is_same_base(
    dtype: torch.dtype, copy_dtype: torch.dtype, *, fast_bfloat16: bool, in_bfloat16: Callable[[], bool]
) -> bool:
    """Whether a base in `dtype` is that of a reference in `copy_dtype`. One in float32 also is where bfloat16 holds
    each of its numbers (`in_bfloat16`, asked where it matters: it may read all weights), unless a GPU computes the
    reference much faster in that (`fast_bfloat16`)."""
    rounds = (dtype, copy_dtype) == (torch.float32, torch.bfloat16)
    return copy_dtype == dtype or (rounds and not fast_bfloat16 and in_bfloat16())


def doubt_of_copy(dtype: torch.dtype, copy_dtype: torch.dtype) -> str | None:
    """What to know about a copy in `copy_dtype` beside a policy in `dtype`; None where both compute the same."""
    if dtype != torch.float32 or copy_dtype == dtype:
        return None
    return (f"reference.dtype: {dtype_name(copy_dtype)} beside a policy in float32: the KL term is not 0 before "
            "anything is learned, and an update without rewards follows what was rounded; reference.dtype float32 is "
            "exact, and faster on devices without products of 16 bits")  # fmt: skip


class FrozenCopy:
    """The base model with its own weights."""

    def __init__(self, model: nn.Module, temperature: float, *, fuses_layers: bool) -> None:
        """`temperature` and `fuses_layers` are the policy's."""
        options = PolicyOptions(temperature, fuses_layers=fuses_layers)
        self.policy = Policy(model.eval().requires_grad_(False), options)

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """See `Reference`."""
        return self.policy(pack)[0]


class AdaptersAtStart:
    """The policy with the values that its adapters had at the start, which are all that it keeps."""

    def __init__(self, wrapped: nn.Module, policy: Policy) -> None:
        self.wrapped, self.policy = wrapped, policy
        self._adapters = [p for name, p in policy.model.named_parameters() if ".lora_" in name]
        self._start = [parameter.detach().clone() for parameter in self._adapters]

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """See `Reference`."""
        now = [parameter.detach().clone() for parameter in self._adapters]
        self.policy.eval()  # its adapters drop nothing
        try:
            self._fill(self._start)
            return self.wrapped(pack)[0]
        finally:
            self._fill(now)
            self.policy.train()

    def _fill(self, values: list[Tensor]) -> None:
        """Write in place: others refer to the same memory."""
        for parameter, value in zip(self._adapters, values, strict=True):
            parameter.detach().copy_(value)


class AdaptersOff:
    """The policy with its adapters off. It has no own weights."""

    def __init__(self, wrapped: nn.Module, policy: Policy) -> None:
        self.wrapped, self.policy = wrapped, policy
        self._layers = lora_layers(policy.model)

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """See `Reference`."""
        with without_adapters(self._layers):
            return self.wrapped(pack)[0]
