"""A linear layer with low-rank adapters as one operation: fewer passes over the activations, the same numbers. Pure.

With one layer each, `W x + s B (A x)` makes three intermediate results of the output's size, and three more in the
backward pass. Here the low-rank products are added in place to the large one.

Dropout is part of the operation: `dropout.py` decides what is dropped, and its scale becomes part of the adapters'.

Shapes: T tokens, I inputs, O outputs, r the adapters' rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .dropout import TokenDropout
from .peft import LoraLinear
from .products import float32_product
from .quantized import QuantizedLinear, dtype_of

Weight = Tensor | Callable[[], Tensor]
"""A frozen weight, or what dequantises it: in the forward pass, and again in the backward pass."""


def add_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor) -> Tensor:
    """`x Wᵀ + bias + low Bᵀ`; x (T, I), W (O, I), low (T, r), B (O, r), all of one dtype, to (T, O).

    In 16 bits the low-rank part of an output may be less than half a unit of its last digit. After rounding, it would
    be lost (99 % of it after a step at a learning rate of 1e-6). It is therefore added before rounding.
    """
    if x.dtype == torch.float32:  # new adapters then only add 0 to the output of the plain layer
        return linear(x, weight, bias).addmm_(low, b.T)
    y = (low @ b.T).addmm_(x, weight.T)
    return y if bias is None else y.add_(bias)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
        kept: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.dtypes = a.dtype, b.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = _scaled_product(x if kept is None else x * kept, a.T, scaling)
        stored, ctx.dequantized = (weight, None) if isinstance(weight, Tensor) else (None, weight)
        ctx.save_for_backward(x, stored, a, b, low, kept)
        ctx.scaling = scaling
        return add_low_rank(x, weight if isinstance(weight, Tensor) else weight(), bias, low, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, a, b, low, kept = ctx.saved_tensors
        grad_low = _scaled_product(grad, b, ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = ctx.dequantized() if stored is None else stored
            if kept is None:
                grad_x = add_low_rank(grad, weight.T, None, grad_low, a.T)
            else:
                grad_x = (grad @ weight).addcmul_(grad_low @ a, kept.to(grad.dtype))
        grads = (grad_low.T, x if kept is None else x * kept), (grad.T, low)
        grad_a, grad_b = (float32_product(*each) if dtype == torch.float32 else (each[0] @ each[1]).to(dtype)
                          for each, dtype in zip(grads, ctx.dtypes, strict=True))  # fmt: skip
        return grad_x, None, None, grad_a, grad_b, None, None


def _scaled_product(x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """`scaling · x y`. A GPU's library scales inside the product, before it rounds."""
    if x.is_cuda:
        return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scaling)
    return (x @ y).mul_(scaling)


def adapted_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, kept: Tensor | None = None
) -> Tensor:
    """`x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ`; x (…, I), W (O, I), A (r, I), B (O, r), to (…, O).

    W has x's dtype, and A and B have that or float32, as their gradients do. `kept` (…, I) bool marks the inputs that
    the adapters see; None means all. Differentiable with respect to x, A and B; the weight and the bias are frozen.
    LoRA: arXiv:2106.09685, equation 3.
    """
    with torch.autocast(x.device.type, enabled=False):
        kept = None if kept is None else kept.flatten(0, -2)
        y = _AdaptedLinear.apply(x.flatten(0, -2), weight, bias, a, b, scaling, kept)
        return y.view(*x.shape[:-1], len(b))


def fuse_adapters(model: nn.Module, is_sharded: Callable[[Tensor], bool], name: str = "default") -> None:
    """Let every linear layer with plain adapters `name` compute them in one operation.

    Layers with torch's dropout or a transposed weight (GPT-2's) keep PEFT's code. So does a call of a layer with a
    weight that `is_sharded`: ZeRO-3 gathers a weight inside the call of the module that owns it.
    """
    for layer in model.modules():
        is_lora = isinstance(layer, LoraLinear) and isinstance(layer.base_layer, nn.Linear) and name in layer.lora_A
        if is_lora and isinstance(layer.lora_dropout[name], (nn.Identity, TokenDropout)):
            layer.forward = _fused(layer, layer.forward, is_sharded, name)


def _fused(
    layer: LoraLinear, plain: Callable[[Tensor], Tensor], is_sharded: Callable[[Tensor], bool], name: str
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        is_quantized = isinstance(base, QuantizedLinear)
        weight = base.dequantized if is_quantized else base.weight
        is_plain = layer.disable_adapters or layer.merged or x.dtype != dtype_of(base)
        if is_plain or any(map(is_sharded, (a, b) if is_quantized else (base.weight, a, b))):
            return plain(x)
        scaling, dropout = layer.scaling[name], layer.lora_dropout[name]
        if not (dropout.training and isinstance(dropout, TokenDropout)):
            return adapted_linear(x, weight, base.bias, a, b, scaling)
        return adapted_linear(x, weight, base.bias, a, b, scaling * dropout.scale, dropout.kept(x))

    return forward
