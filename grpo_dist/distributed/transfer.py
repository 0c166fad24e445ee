"""Small tensors on their way between the host and the device. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes of a joint copy at multiples of which its tensors begin: kernels read as many at once."""


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on `device`. To a GPU they go in one copy from pinned memory, and the host does not wait."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    joined = torch.zeros(sum(sizes), dtype=torch.uint8)
    for part, tensor in zip(joined.split(sizes), tensors, strict=True):
        part[: tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    parts = joined.pin_memory().to(device, non_blocking=True).split(sizes)
    return [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(parts, tensors, strict=True)]  # fmt: skip


class HostCopy:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self.event = None
        if not tensors[0].is_cuda:
            self.copies = [tensor.clone() for tensor in tensors]
            return
        self.copies = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
        ]
        self.event = torch.cuda.Event()
        self.event.record()

    def tensors(self) -> list[Tensor]:
        """The tensors on the host, once what was queued before them is done; nothing later is waited for."""
        if self.event is not None:
            self.event.synchronize()
        return self.copies
