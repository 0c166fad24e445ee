"""ZeRO: what this package does with DeepSpeed, and works around in it.

DeepSpeed's own record says which rank has which part of which parameter. Its public functions
`safe_set_full_fp32_param` and `safe_set_full_optimizer_state` fail under stage 3 before the optimizer has state, and
where a parameter's size is not a multiple of the ranks. A checkpoint is restored in both cases.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from .device import computes_on_gpu
from .launch_config import settle_deepspeed
from .strategy import Fragment


def make_plugin(dtype: torch.dtype, max_grad_norm: float) -> tuple[DeepSpeedPlugin, list[str]]:
    """Accelerate's plugin for the launch's ZeRO options, and a line for each option that the run overrides.

    `dtype` is the policy's compute dtype. Raises ValueError.
    """
    if not computes_on_gpu():
        _keep_from_compiling()
    plugin = DeepSpeedPlugin()
    set_aside = settle_deepspeed(plugin.deepspeed_config, max_grad_norm)
    if dtype == torch.bfloat16:
        _sum_in_float32(plugin.deepspeed_config)
    _require_known_options(plugin.deepspeed_config)
    return plugin, set_aside


def _require_known_options(options: dict[str, Any]) -> None:
    """Raise ValueError for what DeepSpeed itself would refuse, which would be after models are loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(copy.deepcopy(options))
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise ValueError(f"launch config: DeepSpeed refuses its options: {error}") from error


def name_device() -> None:
    """Tell DeepSpeed that there is no GPU, if so: it prints a warning where it finds out by itself.

    Accelerate and transformers import it without being asked, for example to save a model.
    """
    if not computes_on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _keep_from_compiling() -> None:
    """Leave out DeepSpeed's shared-memory collectives; gloo does without them.

    g++ would build them at the first start, which takes a minute and prints nothing. A start that is killed meanwhile
    would leave a lock, and the next start would wait on it.
    """
    from deepspeed import ops

    # set, not asked for: some releases then try all operations, and nothing but these collectives reads the result
    ops.__compatible_ops__ = {**vars(ops).get("__compatible_ops__", {}), "deepspeed_shm_comm": False}


def _import_muon() -> None:
    """Import the Muon of DeepSpeed, which imports it to see that an optimizer is another, and do not let it compile.

    Its decorators import torch's compiler, for which every rank would take a second.
    """
    from deepspeed.runtime import compiler

    if (decorator := getattr(compiler, "compile", None)) is None:  # older releases have no Muon
        return
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ModuleNotFoundError:  # another release has it elsewhere, which costs the second
        pass
    finally:
        compiler.compile = decorator


def _sum_in_float32(options: dict[str, Any]) -> None:
    """Let DeepSpeed add the gradients of packs and of ranks in float32 where it computes in bfloat16, as DDP does.

    In bfloat16 the sum of 64 packs is 1 % off, and depends on the number of packs of a rank. Stage 1 then runs as
    stage 2, which has the same result: with float32 sums, DeepSpeed's stage 1 fails on a gradient of zero.
    """
    options |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    zero = options["zero_optimization"]
    zero["stage"] = 2 if zero["stage"] == 1 else zero["stage"]


class Zero:
    """Each rank has a part of optimizer states and gradients, and in stage 3 of weights. See `strategy.Strategy`."""

    sums_fragments = True

    def __init__(self, plugin: DeepSpeedPlugin) -> None:
        self._options = plugin.deepspeed_config["zero_optimization"]
        self.name = f"DeepSpeed ZeRO-{self._options['stage']}"
        self.shards_weights: bool = self._options["stage"] == 3

    def prepare(
        self, accelerator: Accelerator, policy: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, Any]:
        """See `Strategy`. The buffer for gradients is bounded: its default of 500 million elements takes gigabytes,
        also for adapters."""
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters() if p.requires_grad)
        self._options["reduce_bucket_size"] = min(self._options.get("reduce_bucket_size", 500_000_000), trained)
        _import_muon()
        return accelerator.prepare(policy, optimizer)

    def no_sync(self, wrapped: nn.Module, *, unless: bool) -> AbstractContextManager[Any]:
        """See `Strategy`: `backward` says which pack is the last."""
        return nullcontext()

    def backward(self, wrapped: nn.Module, loss: Tensor, is_last: bool) -> None:
        """See `Strategy`."""
        wrapped.set_gradient_accumulation_boundary(is_boundary=is_last)
        wrapped.backward(loss)

    def step(self, wrapped: nn.Module, optimizer: Any) -> float:
        """See `Strategy`. DeepSpeed's engine clips, and skips a step whose norm is not finite."""
        wrapped.step()
        return float(wrapped.get_global_grad_norm())

    def adam(self, optimizer: Any) -> torch.optim.Optimizer:
        """See `Strategy`."""
        return optimizer.optimizer.optimizer  # inside Accelerate's wrapper is ZeRO's, and inside that is torch's

    def fragment(self, optimizer: Any, parameter: Any) -> Fragment | None:
        """See `Strategy`."""
        zero = optimizer.optimizer
        if is_sharded(parameter):
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = size * dist.get_rank()
            # the parts of the last ranks may be padding beyond the parameter's end
            size = min(size, max(0, parameter.ds_numel - start))
            return Fragment(zero.fp32_partitioned_groups_flat[group], offset, start, size)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(flat, inside.start, outside.start, inside.numel)

    def after_restore(self, parameter: Any, value: Tensor) -> None:
        """See `Strategy`."""
        if not is_sharded(parameter):
            parameter.copy_(value)
            return
        start = parameter.ds_tensor.numel() * dist.get_rank()
        own = value.view(-1)[start : start + parameter.ds_tensor.numel()]
        parameter.ds_tensor.view(-1)[: own.numel()].copy_(own)


def is_sharded(parameter: Tensor) -> bool:
    """Whether each rank has only a part of this parameter, under ZeRO-3."""
    return hasattr(parameter, "ds_id")


def gather_with(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Let each call of the module gather these sharded parameters too, and its backward pass again."""
    if parameters:
        import deepspeed

        for parameter in parameters:
            deepspeed.zero.register_external_parameter(module, parameter)


@contextmanager
def gathered(parameters: list[Tensor]) -> Iterator[None]:
    """Inside, these sharded parameters have their full values. A collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        yield


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """Inside, `from_pretrained` loads full models, also under ZeRO-3, which would otherwise partition every model."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)
