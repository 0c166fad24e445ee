"""FSDP2: torch's `fully_shard`, for launch configs of Accelerate with `distributed_type: FSDP` and `fsdp_version: 2`.

`Accelerator.prepare` shards on GPUs alone, and CPU ranks would run DDP without a word. The policy is therefore sharded
here, the same way on both. The optimizer gets the parts of this rank as plain tensors.

gloo's average in a reduce-scatter is a sum (pytorch/pytorch#162338). Units therefore ask for sums, and divide them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .launch_config import asks_for
from .strategy import Fragment


def take_over() -> bool:
    """Whether the launch asks for FSDP. Accelerate and transformers are not to see that from here on: one would shard a
    single process, and the other load weights on the first rank alone."""
    is_asked_for = asks_for(os.environ, "ACCELERATE_USE_FSDP")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    return is_asked_for


class Fsdp:
    """Each rank has a part of every parameter, its gradient and its moments. See `strategy.Strategy`."""

    name, shards_weights, sums_fragments = "FSDP2", True, True

    def __init__(self, dtype: torch.dtype, max_grad_norm: float) -> None:
        """`dtype` is the policy's compute dtype."""
        self._dtype, self._max_grad_norm = dtype, max_grad_norm
        self._parts: dict[Tensor, nn.Parameter] = {}

    def prepare(
        self, accelerator: Accelerator, policy: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, Any]:
        """See `Strategy`. The policy is sharded in place."""
        names = {id(parameter): name for name, parameter in policy.named_parameters()}
        named = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = []  # else all full weights would live until all are sharded
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for unit, computes_in in _units(policy, self._dtype):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=computes_in)
        sharded: dict[str, Any] = dict(policy.named_parameters())
        for group, own in zip(optimizer.param_groups, named, strict=True):
            parts = {sharded[name]: nn.Parameter(sharded[name].detach().to_local()) for name in own}
            group["params"] = list(parts.values())
            self._parts |= parts
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    vars(parameter).setdefault("places", []).append((module, name))
        return policy, optimizer

    def no_sync(self, wrapped: nn.Module, *, unless: bool) -> AbstractContextManager[Any]:
        """See `Strategy`: each pack's gradient is scattered at once, so that no rank ever has a full one."""
        return nullcontext()

    def backward(self, wrapped: nn.Module, loss: Tensor, is_last: bool) -> None:
        """See `Strategy`."""
        loss.backward()

    @torch.no_grad()
    def step(self, wrapped: nn.Module, optimizer: Any) -> float:
        """See `Strategy`."""
        for parameter in self._parts:
            sharded: Any = parameter.grad
            self._part(parameter).grad = None if sharded is None else sharded.to_local()
        gradients = [part.grad for part in self._parts.values() if part.grad is not None]
        squares = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squares)
        norm = math.sqrt(float(squares))
        if math.isfinite(norm):
            torch._foreach_mul_(gradients, min(1.0, self._max_grad_norm / (norm + 1e-6)))
            optimizer.step()
        optimizer.zero_grad()
        wrapped.zero_grad()
        return norm

    def _part(self, parameter: Any) -> nn.Parameter:
        """This rank's part of a trained parameter, as the optimizer has it, at its present place in memory."""
        part = self._parts[parameter]
        part.data = parameter.detach().to_local()
        return part

    def adam(self, optimizer: Any) -> torch.optim.Optimizer:
        """See `Strategy`."""
        return optimizer

    def fragment(self, optimizer: Any, parameter: Any) -> Fragment | None:
        """See `Strategy`. A rank has rows of the parameter, as many as the others but for the last."""
        rank, num_ranks = parameter.device_mesh.get_local_rank(), parameter.device_mesh.size()
        rows, row_size = -(-parameter.shape[0] // num_ranks), parameter.shape[1:].numel()
        start = min(rank * rows, parameter.shape[0]) * row_size
        part = self._part(parameter)
        return Fragment(part, 0, start, part.numel())

    def after_restore(self, parameter: Any, value: Tensor) -> None:
        """See `Strategy`."""


def _units(policy: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, MixedPrecisionPolicy]]:
    """The modules whose weights are gathered and freed together, inner ones first, and the dtype that each computes in.

    Gradients are added up in the dtype of the weights, which is float32.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = policy.causal_lm
    as_stored = MixedPrecisionPolicy(cast_forward_inputs=False)
    cast = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    computes_in = as_stored if model.dtype == dtype else cast  # with adapters, frozen weights have the dtype already
    for module in reversed(list(model.modules())):
        if isinstance(module, GradientCheckpointingLayer):
            yield module, computes_in
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(p) for end in ends for p in end.parameters()}
    if len(weights) == sum(len(list(end.parameters())) for end in ends):  # tied ones are gathered with what is left
        yield from ((end, computes_in) for end in ends)
    if policy.value_head is not None:
        yield policy.value_head, as_stored
    yield policy, computes_in


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank has only a part of this parameter, under FSDP2."""
    return isinstance(tensor, DTensor)


@contextmanager
def gathered(parameters: list[Any]) -> Iterator[None]:
    """Inside, the modules of these sharded parameters have full ones in their place. A collective."""
    try:
        for parameter in parameters:
            full = nn.Parameter(parameter.detach().full_tensor(), requires_grad=parameter.requires_grad)
            for module, name in parameter.places:
                module._parameters[name] = full
        yield
    finally:
        for parameter in parameters:
            for module, name in parameter.places:
                module._parameters[name] = parameter
