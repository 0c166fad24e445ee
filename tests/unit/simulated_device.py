"""A simulated CUDA device for a CPU build of torch.

Its tensors say `cuda:0` and compute on the CPU. They behave as CUDA's do in what can go wrong without a GPU to see it:
tensors of two devices do not mix, each wait of the host for the device is counted under the line that asks for it, and
a CUDA graph records what is called during its capture, runs none of it then, and replays it on the same memory. Nothing
is known here of time, streams, NCCL, or how CUDA's kernels round. `simulated_cuda.py` puts it into torch.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from cuda_formulas import KERNELS, MORE_KERNELS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
PACKAGE = "/grpo_dist/"
LOOP = "train_step"
"""The function whose callees name the phases of a step."""


@dataclass
class Seen:
    """What happened on the device."""

    syncs: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Waits of the host, by phase, kind and place."""
    kernels: int = 0
    """Kernels started, those of graphs' replays left out."""
    captures: list[int] = field(default_factory=list)
    """Kernels of each graph."""
    replays: int = 0
    capture: list[tuple[list[Tensor], Callable[[], Any]]] | None = None
    """What the graph under way has recorded."""
    sync_mode: str = "default"
    pinned: dict[int, Tensor] = field(default_factory=dict)
    """Page-locked tensors by their address; kept, so that no address comes up twice."""

    def report(self) -> dict[str, Any]:
        """The counts as JSON takes them."""
        syncs = [[*key, count] for key, count in sorted(self.syncs.items())]
        return {"syncs": syncs, "kernels": self.kernels, "captures": self.captures, "replays": self.replays}


SEEN = Seen()


def place() -> tuple[str, str]:
    """The phase of a step, which is the function that the loop has called, and the project's innermost line."""
    frame, innermost, below = sys._getframe(1), "", ""
    while frame is not None:
        code = frame.f_code
        # comprehensions are frames of their own in some Pythons
        if PACKAGE in code.co_filename and not code.co_name.startswith("<"):
            if code.co_name == LOOP:
                return below, innermost
            below = code.co_name
            innermost = innermost or f"{code.co_filename.split(PACKAGE)[-1]}:{code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return "", innermost


def wait(kind: str) -> None:
    """The host waits for the device."""
    phase, where = place()
    if SEEN.capture is not None:
        raise RuntimeError(f"simulated: operation not permitted when stream is capturing ({kind} at {where})")
    if SEEN.sync_mode == "error":
        raise RuntimeError(f"simulated: called a synchronizing CUDA operation ({kind} at {where})")
    SEEN.syncs[phase, kind, where] += 1


class Simulated(Tensor):
    """To C++ it lies on the CPU, to Python on the GPU; `elem` holds the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> Simulated:
        made = Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype, device=CPU
        )
        made.elem = elem
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> Simulated:
        """An alias, as torch's is."""
        return Simulated(self.elem.detach())

    @data.setter
    def data(self, other: Simulated) -> None:
        if self.shape != other.shape or self.dtype != other.dtype:
            raise NotImplementedError("the simulated device exchanges data of one shape and dtype only")
        self.elem = other.elem.detach()

    def cpu(self) -> Tensor:
        """Copy, and wait for it."""
        wait("D2H copy")
        return self.elem.detach().clone()

    def tolist(self) -> Any:
        """Copy, and wait for it."""
        wait("D2H copy")
        return self.elem.tolist()

    def cuda(self, *_: Any, **__: Any) -> Simulated:
        """Already there."""
        return self

    def get_device(self) -> int:
        """The only one's index."""
        return 0

    def data_ptr(self) -> int:
        """The address of the numbers."""
        return self.elem.data_ptr()

    def is_pinned(self, *_: Any) -> bool:
        """Host memory alone can be."""
        return False

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """A copy from the host, which waits."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refused, as CUDA's are."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = Simulated(self.elem.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_: Any) -> str:
        return f"Simulated({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


MODE = Mode()

# operations whose results' sizes, or the results themselves, the host has to know
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default, aten.equal.default,
}  # fmt: skip
NO_KERNEL = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten._local_scalar_dense.default, aten._unsafe_view.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
TAKES_CPU_SCALARS = {aten.fill_.Tensor, aten.where.self, aten.masked_fill_.Tensor, aten.masked_fill.Tensor}


def _tensors(things: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, those of lists included."""
    for each in things:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _bare(thing: Any) -> Any:
    """An argument with the numbers of its tensors."""
    if isinstance(thing, list | tuple):
        return type(thing)(map(_bare, thing))
    return thing.elem if isinstance(thing, Simulated) else thing


def _on_gpu(thing: Any) -> Any:
    """A result with its tensors on the device."""
    if isinstance(thing, list | tuple):
        return type(thing)(map(_on_gpu, thing))
    return Simulated(thing) if isinstance(thing, Tensor) and not isinstance(thing, Simulated) else thing


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of ATen."""
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    plain = [each for each in tensors if not isinstance(each, Simulated)]
    device = kwargs.get("device")
    if len(plain) == len(tensors) and (device is None or torch.device(device).type != "cuda"):
        return func(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):  # in inference mode
        with Mode():
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
    bare = [_bare(args), {name: CPU if name == "device" else _bare(each) for name, each in kwargs.items()}]
    if func is aten._to_copy.default and plain:  # the way back is Simulated.cpu and Tensor.to
        wait_for_copy(plain[0], bool(bare[1].pop("non_blocking", False)))
        return Simulated(_fresh(func(*bare[0], **bare[1]), plain[0]))
    if func is aten.copy_.default and plain:
        wait_for_copy(plain[0], len(args) > 2 and bool(args[2]), to_gpu=isinstance(args[0], Simulated))
        return _run(func, args, kwargs, *bare) if isinstance(args[0], Simulated) else func(*bare[0], **bare[1])
    if func in INDEXING:
        _check_indices(args)
    else:
        _check_devices(func, plain)
    if func in WAITS:
        wait(str(func).removeprefix("aten."))
    if func is aten.isin.Tensor_Tensor and args[1].numel() >= 10 * args[0].numel() ** 0.145:
        wait("isin of many")
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        wait("repeat_interleave without output_size")
    return _run(func, args, kwargs, *bare)


def wait_for_copy(host: Tensor, non_blocking: bool, to_gpu: bool = True) -> None:
    """Only a copy from or to page-locked memory that is asked not to wait does not."""
    if not (non_blocking and host.is_pinned()):
        wait("H2D copy" if to_gpu else "D2H copy")


def _fresh(made: Tensor, given: Tensor) -> Tensor:
    return made.clone() if made.numel() and made.data_ptr() == given.data_ptr() else made


def _check_indices(args: Any) -> None:
    if not isinstance(args[0], Simulated):
        raise RuntimeError(f"simulated: indices lie on the GPU, the indexed tensor on the CPU, at {place()[1]}")
    for index in args[1]:
        if index is not None and not isinstance(index, Simulated):
            wait("H2D copy of an index")
        if index is not None and index.dtype == torch.bool:
            wait("nonzero of a mask")


def _check_devices(func: Any, plain: list[Tensor]) -> None:
    takes_scalars = torch.Tag.pointwise in func.tags or func in TAKES_CPU_SCALARS
    if any(each.dim() or not takes_scalars for each in plain):
        raise RuntimeError(
            f"simulated: expected all tensors on one device, but {func} got one on the CPU, at {place()[1]}"
        )


def _run(func: Any, args: Any, kwargs: Any, bare_args: Any, bare_kwargs: Any) -> Any:
    """Compute an operation on the bare tensors, or record it where a graph is captured."""
    view = func is aten._unsafe_view.default or any(
        each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns
    )
    if not view and func not in NO_KERNEL:
        SEEN.kernels += 1 + MORE_KERNELS.get(func, 0)

    compute = partial(KERNELS.get(func, func), *bare_args, **bare_kwargs)

    if SEEN.capture is None or view:
        return return_and_correct_aliasing(func, args, kwargs, _on_gpu(compute()))
    if func._schema.is_mutable:  # recorded, not run
        SEEN.capture.append(([], compute))
        return return_and_correct_aliasing(func, args, kwargs, _on_gpu(bare_kwargs.get("out", bare_args[0])))
    made = compute()
    outputs = list(_tensors([made]))
    SEEN.capture.append((outputs, compute))
    for each in outputs:  # nothing may rely on what lies there before the first replay
        if each.is_floating_point():
            each.fill_(math.nan)
    return return_and_correct_aliasing(func, args, kwargs, _on_gpu(made))


class CUDAGraph:
    """The recorded operations of a capture."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def capture_begin(self, **_: Any) -> None:
        """Record what is called from here on, and run nothing."""
        SEEN.capture = []

    def capture_end(self) -> None:
        """Go on running what is called."""
        self.records = SEEN.capture
        SEEN.captures.append(len(SEEN.capture))
        SEEN.capture = None

    def replay(self) -> None:
        """Run them on the memory of the capture."""
        SEEN.replays += 1
        with torch.no_grad(), _disable_current_modes():
            for outputs, compute in self.records:
                for old, fresh in zip(outputs, _tensors([compute()]), strict=False):
                    old.copy_(fresh)

    def reset(self) -> None:
        """Let go of the memory."""
        self.records = []

    def pool(self) -> tuple[int, int]:
        """A pool's handle."""
        return (0, 1)
