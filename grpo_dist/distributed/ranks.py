"""The ranks of a run: their numbers, their collectives, and the optimizer step that all of them take.

The same calls serve one process, DDP, ZeRO and FSDP2, on GPUs (NCCL) and on CPU ranks (gloo). What differs between
them is in strategy.py, deepspeed.py and fsdp.py.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from ..config.places import UnwritableOutput
from ..config.schema import OptimConfig
from . import deepspeed, fsdp
from .cores import num_cores
from .device import computes_on_gpu, slow_here
from .launch import LaunchError, place_in_launch
from .launch_config import asks_for, set_aside_fsdp, set_aside_precision
from .rendezvous import START_SECONDS, Rendezvous, warn_of_idle_gpus
from .row_group import row_group
from .strategy import Replicated, Strategy
from .watch import Interrupted

log = logging.getLogger(__name__)

Thing = TypeVar("Thing")

START = timedelta(seconds=START_SECONDS)
"""Time limit of a collective until the run has started."""
PATIENCE = timedelta(hours=12)
"""Time limit of a collective afterwards: a rollout or a slow disk takes time, and watch.py ends a run that hangs."""


def _bound_kernel_caches() -> None:
    """Let oneDNN and torch keep few of the kernels that they make for every new shape.

    Packs often have a new shape. By default each of the two keeps 1,024 kernels, which take hundreds of megabytes, and
    hardly one is used again.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _bound_threads() -> None:
    """Let torch use no more threads than a container's quota has cores, unless OMP_NUM_THREADS says how many."""
    cores, threads = num_cores(), torch.get_num_threads()
    if cores < threads and "OMP_NUM_THREADS" not in os.environ:
        log.info("CPU: %d threads in place of %d, because this process may use no more cores", cores, threads)
        torch.set_num_threads(cores)


class PhaseError(RuntimeError):
    """A phase failed on some rank. All ranks raise it, with the traceback of every rank that failed."""


class Ranks:
    """All processes of the run, seen from one of them."""

    def __init__(self, dtype: torch.dtype, optim: OptimConfig, sequence_parallel_size: int = 1) -> None:
        """Join the process group. `dtype` is the policy's compute dtype; `sequence_parallel_size` divides the number of
        ranks. Raises LaunchError where ranks are missing, do not reach one another, or would share a GPU."""
        _bound_kernel_caches()
        _bound_threads()
        rank, num_ranks = place_in_launch()
        self._rendezvous = Rendezvous.meet(rank, num_ranks) if num_ranks > 1 else None
        if self._rendezvous is not None:
            self._rendezvous.check_gpus()
            self._rendezvous.choose_interface()
        else:
            warn_of_idle_gpus()
        if slow := slow_here(dtype):
            log.warning("%s", slow)
        deepspeed.name_device()
        precision = "bf16" if dtype == torch.bfloat16 else "no"
        set_aside = set_aside_precision(os.environ, precision)
        plugin, shards = None, fsdp.take_over() and num_ranks > 1
        if shards:
            set_aside += set_aside_fsdp(os.environ)
        if asks_for(os.environ, "ACCELERATE_USE_DEEPSPEED"):
            try:
                plugin, further = deepspeed.make_plugin(dtype, optim.max_grad_norm)
            except ValueError as error:
                raise LaunchError(str(error), by_all=self.fail(error)) from error
            set_aside += further
        for line in set_aside:
            log.warning("%s", line)
        with nullcontext() if self._rendezvous is None else self._rendezvous.first_collective():
            # under FSDP2 the units say in which dtype they compute
            self.accelerator = self._accelerator("no" if shards else precision, plugin, num_ranks > 1)
            # a group for flags: unlike a collective of the training's backend, it does not wait for the device
            self._control = dist.new_group(backend="gloo", timeout=START) if self.num_ranks > 1 else None
            if self.num_ranks > 1:
                dist.all_reduce(flag := torch.ones(1, device=self.device))
                flag.item()  # waits for the device
        self.strategy: Strategy
        if shards:
            self.strategy = fsdp.Fsdp(dtype, optim.max_grad_norm)
        else:
            self.strategy = (
                Replicated(self.num_ranks, optim.max_grad_norm) if plugin is None else deepspeed.Zero(plugin)
            )
        self.row_group = row_group(self.rank, self.num_ranks, sequence_parallel_size)
        self.collectives_entered = 0
        """Collectives of this class that this rank has entered. The others wait for the rank that has entered least."""

    @staticmethod
    def _accelerator(precision: str, plugin: DeepSpeedPlugin | None, several: bool) -> Accelerator:
        on_cpu = not computes_on_gpu()
        backend = {"backend": "gloo"} if on_cpu and (plugin is not None or several) else {}
        return Accelerator(
            # under DeepSpeed, cpu=True would give every process a world of its own; there the handler names gloo
            cpu=on_cpu and plugin is None,
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            deepspeed_plugin=plugin,
            dynamo_backend="no",  # whatever the launch config says
            kwargs_handlers=[InitProcessGroupKwargs(timeout=START, **backend)],
        )

    def wait_at(self, point: str) -> None:
        """Wait without a collective until all ranks have passed a point; the log names those that have not."""
        if self._rendezvous is not None:
            self._rendezvous.wait_at(point, PATIENCE.total_seconds())

    def fail(self, error: Exception) -> bool:
        """End the ranks that wait for this one in `wait_at`; returns whether all know, or have failed too."""
        return self._rendezvous is None or self._rendezvous.fail(error)

    def end_start(self) -> None:
        """From here on PATIENCE is the time limit of a collective."""
        if self.num_ranks > 1:  # DeepSpeed makes groups of its own, with limits of 10 or 30 minutes
            for group in dist.distributed_c10d._world.pg_map:
                dist.distributed_c10d._set_pg_timeout(PATIENCE, group)

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return self.accelerator.process_index

    @property
    def num_ranks(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.accelerator.device

    def share(self, count: int) -> slice:
        """This rank's part of `count` pieces of work: contiguous, and at most one larger than another rank's."""
        return slice(count * self.rank // self.num_ranks, count * (self.rank + 1) // self.num_ranks)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.collectives_entered += 1
        self.accelerator.wait_for_everyone()

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors, of any lengths, joined along the first dimension in order of rank, on the CPU."""
        self.collectives_entered += 1
        if self.num_ranks == 1:
            return tensor.cpu()
        tensor, dtype = tensor.to(self.device), tensor.dtype
        if dtype == torch.int16:  # neither NCCL nor gloo sends such numbers
            tensor = tensor[..., None].contiguous().view(torch.uint8)
        sizes = torch.zeros(self.num_ranks, dtype=torch.int64, device=self.device)
        sizes[self.rank] = tensor.shape[0]
        dist.all_reduce(sizes)
        longest = int(sizes.max())
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.num_ranks)]
        dist.all_gather(parts, padded)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)]).cpu()
        return whole if whole.dtype == dtype else whole.view(dtype)[..., 0]

    def gather_objects(self, thing: Thing) -> list[Thing]:
        """One small picklable object from each rank, in order of rank."""
        self.collectives_entered += 1
        if self.num_ranks == 1:
            return [thing]
        things: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(things, thing, group=self._control)
        return things

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """Sum (`sum`) or maximum (`max`) of a tensor over all ranks, on the CPU."""
        self.collectives_entered += 1
        values = values.to(self.device, copy=True)
        if self.num_ranks > 1:
            dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
        return values.cpu()

    @contextmanager
    def shared_errors(self, phase: str) -> Iterator[None]:
        """Run a phase without collectives in it; an error on one rank ends it on every rank.

        All ranks raise PhaseError for a failure and Interrupted for a stop. Otherwise the other ranks would wait in
        their next collective until its time-out. The error names where each failure comes from, except for a file that
        cannot be written, whose own message says everything.
        """
        failure = stop = cause = None
        try:
            yield
        except Interrupted as interrupted:
            stop = interrupted
        except Exception as error:
            says_all = isinstance(error, UnwritableOutput)
            failure, cause = str(error) if says_all else f"\n{traceback.format_exc()}", error
        ends = self.gather_objects((failure, stop))
        failures = [(rank, text) for rank, (text, _) in enumerate(ends) if text]
        if failures:
            texts = "\n".join(f"rank {rank}: {text}" for rank, text in failures)
            raise PhaseError(f"{phase} failed on {len(failures)} of {self.num_ranks} ranks. {texts}") from cause
        for _, ending in ends:
            if ending:
                raise Interrupted(str(ending), failed=ending.failed)

    def stop_if_any(self, requested: str | None) -> None:
        """Raise Interrupted on every rank where any is requested to stop; for the inside of an update. A collective."""
        self.collectives_entered += 1
        if self._control is None:
            if requested:
                raise Interrupted(requested)
            return
        flag = torch.tensor([int(requested is not None)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control)
        if flag.item():
            raise Interrupted(next(reason for reason in self.gather_objects(requested) if reason))

    def prepare(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The policy and its optimizer, wrapped for this run (DDP, a DeepSpeed engine, or as they are)."""
        return self.strategy.prepare(self.accelerator, policy, optimizer)

    def no_sync(self, wrapped: nn.Module, *, unless: bool) -> AbstractContextManager[Any]:
        """Context of a pack's forward and backward pass: ranks exchange gradients only after the last pack."""
        return self.strategy.no_sync(wrapped, unless=unless)

    def backward(self, wrapped: nn.Module, loss: Tensor, is_last: bool) -> None:
        """Add one pack's gradient. The last pack of an update synchronises the ranks.

        All strategies average over ranks while the loss is a share of the global one, hence the factor.
        """
        self.collectives_entered += is_last
        self.strategy.backward(wrapped, loss * self.num_ranks, is_last)

    def optimizer_step(self, wrapped: nn.Module, optimizer: Any, learning_rate: float) -> float:
        """Clip, step and clear; returns the gradient's norm before clipping.

        No rank steps where the norm is not finite: the norm is the same number on all ranks.
        """
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_share"]
        return self.strategy.step(wrapped, optimizer)

    def end(self) -> None:
        """Leave the process group."""
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
