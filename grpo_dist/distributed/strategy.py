"""How a policy is spread over ranks and how its optimizer steps: the interface of DDP, ZeRO and FSDP2.

`Replicated` is one process and DDP. ZeRO is in deepspeed.py, FSDP2 in fsdp.py.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose float32 value and Adam moments are on this rank."""

    flat: Tensor
    """The optimizer's own flattened tensor that contains the part: the key of its state."""
    flat_start: int
    """Where in `flat` the part begins."""
    start: int
    """Where in the flattened parameter the part begins."""
    size: int
    """Elements of the part."""

    @property
    def place(self) -> slice:
        """Of the part in the flattened parameter."""
        return slice(self.start, self.start + self.size)

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that is laid out as `flat`."""
        return tensor.detach().view(-1)[self.flat_start : self.flat_start + self.size]


class Strategy(Protocol):
    """What a run needs of the way in which its policy is spread over ranks."""

    name: str
    """The name that users see."""
    shards_weights: bool
    """Whether ranks have parts of the weights, which are gathered for each computation."""
    sums_fragments: bool
    """Whether ranks have different fragments, whose sum is the full tensor."""

    def prepare(
        self, accelerator: Accelerator, policy: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, Any]:
        """The policy, spread over the ranks and wrapped for its calls, and its optimizer."""

    def no_sync(self, wrapped: nn.Module, *, unless: bool) -> AbstractContextManager[Any]:
        """Context of a pack's forward and backward pass: ranks exchange gradients only after the last pack."""

    def backward(self, wrapped: nn.Module, loss: Tensor, is_last: bool) -> None:
        """Add one pack's gradient, which the strategy averages over ranks."""

    def step(self, wrapped: nn.Module, optimizer: Any) -> float:
        """Clip, step and clear; returns the gradient's norm before clipping. No rank steps where it is not finite."""

    def adam(self, optimizer: Any) -> torch.optim.Optimizer:
        """The optimizer that has the moments, under the wrappers."""

    def fragment(self, optimizer: Any, parameter: Any) -> Fragment | None:
        """This rank's part of a parameter; None where it has none."""

    def after_restore(self, parameter: Any, value: Tensor) -> None:
        """Give a parameter its new `value` where the model computes with a copy of the optimizer's."""


class Replicated:
    """One process, or DDP: every rank has all weights and moments."""

    shards_weights = sums_fragments = False

    def __init__(self, num_ranks: int, max_grad_norm: float) -> None:
        self.name = "DDP" if num_ranks > 1 else "one process"
        self._max_grad_norm = max_grad_norm

    def prepare(
        self, accelerator: Accelerator, policy: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, Any]:
        """See `Strategy`."""
        return accelerator.prepare(policy, optimizer)

    def no_sync(self, wrapped: nn.Module, *, unless: bool) -> AbstractContextManager[Any]:
        """See `Strategy`."""
        return wrapped.no_sync() if hasattr(wrapped, "no_sync") and not unless else nullcontext()

    def backward(self, wrapped: nn.Module, loss: Tensor, is_last: bool) -> None:
        """See `Strategy`."""
        loss.backward()

    def step(self, wrapped: nn.Module, optimizer: Any) -> float:
        """See `Strategy`."""
        adam = self.adam(optimizer)  # Accelerate's wrapper searches for packages at each step
        trained = [parameter for group in adam.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self._max_grad_norm))
        if math.isfinite(norm):
            adam.step()
        adam.zero_grad()
        return norm

    def adam(self, optimizer: Any) -> torch.optim.Optimizer:
        """See `Strategy`."""
        return optimizer.optimizer  # inside Accelerate's wrapper is torch's own

    def fragment(self, optimizer: Any, parameter: Any) -> Fragment | None:
        """See `Strategy`."""
        return Fragment(parameter, 0, 0, parameter.numel())

    def after_restore(self, parameter: Any, value: Tensor) -> None:
        """See `Strategy`."""
