"""Parameters of which a rank has only a part, under ZeRO-3 and FSDP2: the caller need not know under which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import deepspeed, fsdp


def is_sharded(parameter: Tensor) -> bool:
    """Whether each rank has only a part of this parameter."""
    return deepspeed.is_sharded(parameter) or fsdp.is_sharded(parameter)


def is_whole(parameter: Any) -> bool:
    """Whether this rank has all numbers of this parameter now: it is not sharded, or is gathered."""
    return parameter.shape == full_shape(parameter) and not fsdp.is_sharded(parameter)


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter in full, with the parts of all ranks."""
    return parameter.ds_shape if deepspeed.is_sharded(parameter) else parameter.shape


def gather_with(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let each call of the module, and its backward pass, have these parameters in full, which are other modules'.

    FSDP2 gathers whole layers anyway.
    """
    deepspeed.gather_with(module, [p for p in parameters if deepspeed.is_sharded(p)])


@contextmanager
def gathered(parameters: list[Tensor]) -> Iterator[None]:
    """Inside, the modules of these parameters have full ones on every rank; the caller takes them from the modules, and
    only reads them. A collective if any of the parameters is sharded."""
    with ExitStack() as stack:
        for kind in (deepspeed, fsdp):
            if sharded := [p for p in parameters if kind.is_sharded(p)]:
                stack.enter_context(kind.gathered(sharded))
        yield
