"""Small tensors on their way to the device. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype on `device`. To a GPU they go in one copy from pinned memory, and the host does not wait."""
    assert len({tensor.dtype for tensor in tensors}) <= 1, "one copy has one dtype"
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    joined = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = joined.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
