"""How much of what was learned is in the weights that decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.expert_adapters import adapted_weight, factors
from ..model.peft import ADAPTER, LoraLayer, ParamWrapper
from ..model.quantized import QuantizedLinear, dtype_of
from .native.llama import linear_of
from .native.relaid import can_be_compact


@torch.no_grad()
def update_share(model: nn.Module, *, merged: bool, compact: bool = False) -> float | None:
    """Share of the adapters' update that is in the weights which decode: the projection of these weights' update on
    ΔW = scaling · B A, over that of ΔW itself. None without adapters, and as long as they add nothing that float32 can
    hold beside the weights: AdamW makes a small update also of a gradient that is only rounding.

    `merged` where adapters are added to weights that are not quantised, as on a CPU in float32, and with `compact` (see
    `KernelStep`) only to those that bfloat16 does not hold; else they are apart, rounded to the dtype of the weights.
    """
    present = total = weights = 0.0
    for module in model.modules():
        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            continue
        b, a = factors(module)
        scaling = module.scaling[ADAPTER]
        dtype = adapted_weight(module).dtype if isinstance(module, ParamWrapper) else dtype_of(module.get_base_layer())
        exact_a, exact_b = a.double(), b.double()
        total += scaling**2 * _inner(exact_a, exact_b, exact_a, exact_b)
        weights += float(torch.linalg.vector_norm(adapted_weight(module), dtype=torch.float32)) ** 2
        layer = linear_of(module) if merged and not isinstance(module.get_base_layer(), QuantizedLinear) else None
        if layer is not None and not (compact and can_be_compact(layer.weight)):
            added = (layer.merged() - layer.weight).double()
            present += scaling * float(((exact_b.mT @ added) * exact_a).sum())
        else:
            present += scaling**2 * _inner(exact_a, exact_b, a.to(dtype).double(), b.to(dtype).double())
    return present / total if total > torch.finfo(torch.float32).eps ** 2 * weights else None


def _inner(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> float:
    """The sum of the products of two updates' entries, B A and B' A', without either."""
    return float(((b.mT @ other_b) * (a @ other_a.mT)).sum())
