"""Put the simulated CUDA device (`simulated_device.py`) into torch, and run a module with it.

    python tests/unit/simulated_cuda.py REPORT.json MODULE ARGUMENTS…

`install()` changes torch for the rest of the process, so tests that train use it in processes of their own. It has to
be called before grpo_dist is imported.
"""

from __future__ import annotations

import functools
import json
import runpy
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import simulated_kernels
import torch
import torch.utils._device
from cuda_formulas import attention
from simulated_device import CUDA, MODE, SEEN, CUDAGraph, Mode, Simulated, wait
from torch import Tensor
from torch.nn.utils import clip_grad

FACTORIES = ("zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like", "full_like", "rand",
             "randn", "randint", "randperm", "linspace", "eye")  # fmt: skip


def is_cuda(device: Any) -> bool:
    """Whether an argument names the GPU."""
    return isinstance(device, int) or (isinstance(device, str | torch.device) and torch.device(device).type == "cuda")


def install() -> None:
    """Put the device into torch for the rest of this process."""
    torch.utils._device._device_constructors()  # cached by identity before they are replaced
    _replace_moves()
    _replace_factories()
    _replace_cuda()
    _replace_libraries()
    torch.__future__.set_swap_module_params_on_conversion(True)
    MODE.__enter__()


def _replace_moves() -> None:
    plain_to = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        target = next((each for each in [*args, kwargs.get("device")] if isinstance(each, str | torch.device)), None)
        if not isinstance(self, Simulated):
            args = [CUDA if isinstance(each, str | torch.device) and is_cuda(each) else each for each in args]
            kwargs |= {"device": CUDA} if is_cuda(kwargs.get("device")) else {}
            with Mode() if is_cuda(target) else nullcontext():  # threads start without it
                return plain_to(self, *args, **kwargs)
        dtypes = [each for each in args if isinstance(each, torch.dtype)]
        others = {name: each for name, each in kwargs.items() if name in ("dtype", "copy") and each}
        source = self
        if target is not None and not is_cuda(target):
            if not kwargs.get("non_blocking"):
                wait("D2H copy")
            source = self.elem.detach().clone()
        return plain_to(source, *dtypes, **others) if dtypes or others else source

    def pin_memory(self: Tensor, *_: Any) -> Tensor:
        pinned = self.clone()
        SEEN.pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    Tensor.to = Simulated.to = to
    Tensor.pin_memory = pin_memory
    Tensor.is_pinned = lambda self, *_: self.untyped_storage().data_ptr() in SEEN.pinned
    Tensor.cuda = lambda self, *_, **kwargs: self.to(CUDA, **kwargs)


def _replace_factories() -> None:
    def on_device(real: Callable[..., Tensor], copies: bool) -> Callable[..., Tensor]:
        @functools.wraps(real)
        def made(*args: Any, **kwargs: Any) -> Tensor:
            if kwargs.pop("pin_memory", False):
                return real(*args, **kwargs).pin_memory()
            device = kwargs.pop("device", None)
            if not is_cuda(device):
                return real(*args, **kwargs) if device is None else real(*args, device=device, **kwargs)
            if copies:
                return real(*args, **kwargs).to(CUDA)
            with Mode():
                return real(*args, device=CUDA, **kwargs)

        return made

    for name in ("tensor", "as_tensor"):
        setattr(torch, name, on_device(getattr(torch, name), copies=True))
    for name in FACTORIES:
        setattr(torch, name, on_device(getattr(torch, name), copies=False))


class Event:
    """An event of a device that has always finished."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Nothing to mark."""

    def query(self) -> bool:
        """Always done."""
        return True

    def synchronize(self) -> None:
        """A wait of the host."""
        wait("event")

    def elapsed_time(self, _: Event) -> float:
        """Milliseconds; time is not simulated."""
        return 1.0


class Stream:
    """A stream; there is one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        """Nothing to wait for."""

    wait_event = record_event = wait_stream

    def synchronize(self) -> None:
        """A wait of the host."""
        wait("stream")

    def is_capturing(self) -> bool:
        """What torch's optimizers ask."""
        return False


def _replace_cuda() -> None:
    gib = 1 << 30
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "set_device": None,
        "is_bf16_supported": True, "get_device_name": "simulated", "get_device_capability": (9, 0), "_lazy_init": None,
        "mem_get_info": (60 * gib, 80 * gib), "empty_cache": None, "manual_seed_all": None, "manual_seed": None,
        "max_memory_allocated": 0, "max_memory_reserved": 0, "memory_allocated": 0, "memory_reserved": 0,
        "reset_peak_memory_stats": None, "graph_pool_handle": (0, 1), "set_rng_state": None, "memory_stats": {},
        "is_current_stream_capturing": False,
    }  # fmt: skip
    cuda = torch.cuda
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        major=9, minor=0, total_memory=80 * gib, name="simulated", multi_processor_count=132
    )
    cuda.synchronize = lambda *_: wait("synchronize")
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.current_stream = cuda.default_stream = torch.accelerator.current_stream = Stream
    cuda.stream = lambda *_: nullcontext()
    cuda.Event, cuda.Stream, cuda.CUDAGraph = Event, Stream, CUDAGraph
    modes = ["default", "warn", "error"]
    cuda.set_sync_debug_mode = lambda mode: setattr(SEEN, "sync_mode", mode if isinstance(mode, str) else modes[mode])
    cuda.get_sync_debug_mode = lambda: modes.index(SEEN.sync_mode)


def _keep_clipping_on_the_device() -> None:
    """Gradients are grouped by device in C++, which takes the simulated one for the CPU."""
    plain = clip_grad._group_tensors_by_device_and_dtype

    def grouped(tensors: Any, *args: Any) -> Any:
        return {(CUDA if isinstance(each[0][0], Simulated) else device, dtype): (each, places)
                for (device, dtype), (each, places) in plain(tensors, *args).items()}  # fmt: skip

    clip_grad._group_tensors_by_device_and_dtype = grouped


def _replace_libraries() -> None:
    _keep_clipping_on_the_device()
    plain_attention = torch.nn.functional.scaled_dot_product_attention

    @functools.wraps(plain_attention)
    def either(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (attention if isinstance(query, Simulated) else plain_attention)(query, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = either
    plain_norm = torch.nn.functional.rms_norm

    @functools.wraps(plain_norm)
    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if isinstance(x, Simulated) and weight is not None:
            return simulated_kernels.RmsNorm.apply(x, weight, eps)
        return plain_norm(x, shape, weight, eps)

    torch.nn.functional.rms_norm = norm

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast = torch.amp.autocast = Autocast
    from transformers import PreTrainedModel

    plain_loading = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(plain_loading)
    def from_pretrained(cls: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        MODE.__exit__(None, None, None)  # weights are read on the CPU
        try:
            loaded = plain_loading(cls, *args, **kwargs)
        finally:
            MODE.__enter__()
        place = device_map.get("") if isinstance(device_map, dict) else device_map
        if place is None:
            return loaded
        model, *report = loaded if isinstance(loaded, tuple) else (loaded,)
        model = model.to(CUDA if is_cuda(place) else place)
        return (model, *report) if report else model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def main(report: str, module: str, *arguments: str) -> None:
    """Run a module as `python -m` does, and write down what was seen of the device."""
    install()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        Path(report).write_text(json.dumps(SEEN.report()))


if __name__ == "__main__":
    main(*sys.argv[1:])
