"""Linear layers with low-rank adapters as one operation: fewer passes over the activations, the same numbers.

With one layer each, `W x + s B (A x)` makes three intermediate results of the output's size, and three more in the
backward pass. Here the low-rank products are added in place to the large one.

On a GPU the layers that get one input (queries, keys and values; a gate and what it multiplies) are one operation. The
products of the input with all A are one, as are those for their gradients, and the input's gradient is summed in place.
SwiGLU's gate is part of such an operation, which then writes no output of the two layers with what the adapters add.

Dropout is part of the operation: `dropout.py` decides what is dropped, and its scale becomes part of the adapters'.

Shapes: T tokens, I inputs, O outputs, r the adapters' rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..distributed.sharding import is_sharded
from .dropout import TokenDropout
from .peft import ADAPTER, LoraLinear
from .products import summed_over_rows, weighted
from .quantized import QuantizedLinear, dtype_of

HALVES = (torch.bfloat16, torch.float16)

Weight = Tensor | Callable[[], Tensor]
"""A frozen weight, or what dequantises it: in the forward pass, and again in the backward pass."""


def add_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor) -> Tensor:
    """`x Wᵀ + bias + low Bᵀ`; x (T, I), W (O, I), low (T, r), B (O, r), all of one dtype, to (T, O).

    In 16 bits the low-rank part of an output may be less than half a unit of its last digit. After rounding, it would
    be lost (99 % of it after a step at a learning rate of 1e-6). It is therefore added before rounding.
    """
    if x.dtype == torch.float32:  # new adapters then only add 0 to the output of the plain layer
        return weighted(x, weight, bias).addmm_(low, b.T)
    y = (low @ b.T).addmm_(x, weight.T)
    return y if bias is None else y.add_(bias)


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], scaling: float,
        kept: Tensor | None, has_gate: bool, *adapters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """`adapters` are all A, then all B. With `has_gate` there are two layers, without biases, and one output."""
        count = len(weights)
        ctx.dtypes, ctx.scaling = (adapters[0].dtype, adapters[count].dtype), scaling
        ranks = [len(a) for a in adapters[:count]]
        a, *b = (each.to(x.dtype) for each in (_stacked(adapters[:count], 0), *adapters[count:]))
        low = _scaled_product(x if kept is None else x * kept, a.T, scaling)
        ctx.weights = [None if isinstance(each, Tensor) else each for each in weights]
        stored = (each if isinstance(each, Tensor) else None for each in weights)
        whole = (each if isinstance(each, Tensor) else each() for each in weights)
        if has_gate:
            from .gate_kernel import Adapters, gated

            gate, up = (x @ each.T for each in whole)
            ctx.save_for_backward(x, a, low, kept, *stored, *b, gate, up)
            return (gated(gate, up, Adapters(low, *b)),)
        ctx.save_for_backward(x, a, low, kept, *stored, *b)
        parts = zip(whole, biases, _divided(low, ranks, 1), b, strict=True)
        return tuple(add_low_rank(x, each, bias, part, up) for each, bias, part, up in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, low, kept, *rest = ctx.saved_tensors
        count = len(ctx.weights)
        stored, b, inputs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        if inputs:
            from .gate_kernel import Adapters, gated_backward

            gate, up = inputs
            grads = gated_backward(grads[0].contiguous(), gate, up, Adapters(low, *b))
        ranks = [each.shape[1] for each in b]
        grad_low = _stacked([_scaled_product(*each, ctx.scaling) for each in zip(grads, b, strict=True)], 1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            for grad, weight, dequantized in zip(grads, stored, ctx.weights, strict=True):
                weight = dequantized() if weight is None else weight
                if grad_x is not None:
                    grad_x.addmm_(grad, weight)
                elif kept is None:
                    grad_x = add_low_rank(grad, weight.T, None, grad_low, a.T)
                else:
                    grad_x = weighted(grad, weight.T).addcmul_(grad_low @ a, kept.to(grad.dtype))
        grad_a = _divided(_of_adapter(grad_low, x if kept is None else x * kept, ctx.dtypes[0]), ranks, 0)
        parts = zip(grads, _divided(low, ranks, 1), strict=True)
        grad_b = (_of_adapter(grad, part, ctx.dtypes[1]) for grad, part in parts)
        return grad_x, None, None, None, None, None, *grad_a, *grad_b


def _stacked(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _divided(x: Tensor, sizes: list[int], dim: int) -> Sequence[Tensor]:
    return [x] if len(sizes) == 1 else x.split(sizes, dim)


def _of_adapter(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return summed_over_rows(x, y) if dtype == torch.float32 else (x.T @ y).to(dtype)


def _scaled_product(x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """`scaling · x y`. A GPU's library scales inside the product, before it rounds."""
    if x.is_cuda:
        return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scaling)
    return weighted(x, y.T).mul_(scaling)


def adapted_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, kept: Tensor | None = None
) -> Tensor:
    """`adapted_linears` of one layer."""
    return adapted_linears(x, [weight], [bias], [a], [b], scaling, kept)[0]


def adapted_linears(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scaling: float, kept: Tensor | None = None, has_gate: bool = False,
) -> list[Tensor]:  # fmt: skip
    """`x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ` of some layers; x (…, I), each W (O, I), A (r, I), B (O, r), to (…, O). With
    `has_gate`, of two layers of one size without biases, silu of the first times the second, by Triton's kernels.

    W has x's dtype, and A and B have that or float32, as their gradients do. `kept` (…, I) bool marks the inputs that
    the adapters see; None means all. Differentiable with respect to x, A and B; the weight and the bias are frozen.
    LoRA: arXiv:2106.09685, equation 3.
    """
    kind = x.device.type
    # to leave autocast takes longer than a small product, also where it is off
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        kept = None if kept is None else kept.flatten(0, -2)
        rows = _AdaptedLinears.apply(x.flatten(0, -2), weights, biases, scaling, kept, has_gate, *a, *b)
        return [y.view(*x.shape[:-1], y.shape[1]) for y in rows]


def fuse_adapters(model: nn.Module) -> None:
    """Let every linear layer with plain adapters compute them in one operation.

    Layers with torch's dropout or a transposed weight (GPT-2's) keep PEFT's code. So does a call of a layer with a
    sharded weight: ZeRO-3 gathers a weight inside the call of the module that owns it.
    """
    for module in model.modules():
        families = {child: family for names in SIBLINGS if (family := _family(module, names))
                    for child in family.layers}  # fmt: skip
        for layer, family in families.items():
            layer.family = family
        for layer in module.children():
            if is_adapted(layer):
                layer.forward = _fused(layer, layer.forward, families.get(layer))


def is_adapted(layer: nn.Module) -> bool:
    """Whether a layer is torch's own or a quantised one, with adapters that `adapted_linears` computes."""
    is_lora = isinstance(layer, LoraLinear) and isinstance(layer.base_layer, nn.Linear) and ADAPTER in layer.lora_A
    return is_lora and isinstance(layer.lora_dropout[ADAPTER], (nn.Identity, TokenDropout))


def _fused(layer: LoraLinear, plain: Callable[[Tensor], Tensor], family: _Family | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if not _fits(layer, x):
            return plain(x)
        scaling, dropout = layer.scaling[ADAPTER], layer.lora_dropout[ADAPTER]
        if drops(layer):
            return _computed([layer], x, scaling * dropout.scale, dropout.kept(x))[0]
        if family is not None and family.fits(x):
            return family.output(layer, x)
        return _computed([layer], x, scaling)[0]

    return forward


def _fits(layer: LoraLinear, x: Tensor) -> bool:
    """Whether a layer adds its adapters to `x` now, and has all of its weights."""
    if layer.disable_adapters or layer.merged or x.dtype != dtype_of(base := layer.base_layer):
        return False
    adapters = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return not any(map(is_sharded, adapters if isinstance(base, QuantizedLinear) else (base.weight, *adapters)))


def drops(layer: LoraLinear) -> bool:
    """Whether a layer's adapters see a part of their input now."""
    return layer.lora_dropout[ADAPTER].training and isinstance(layer.lora_dropout[ADAPTER], TokenDropout)


def _shares_products(x: Tensor) -> bool:
    """Whether layers of one input are computed together: where reading the input costs more than its small products."""
    return x.is_cuda


def _computed(
    layers: Sequence[LoraLinear], x: Tensor, scaling: float, kept: Tensor | None = None, has_gate: bool = False
) -> list[Tensor]:
    bases = [layer.base_layer for layer in layers]
    weights = [base.dequantized if isinstance(base, QuantizedLinear) else base.weight for base in bases]
    a, b = ([each[ADAPTER].weight for each in adapters] for adapters in
            ([layer.lora_A for layer in layers], [layer.lora_B for layer in layers]))  # fmt: skip
    return adapted_linears(x, weights, [base.bias for base in bases], a, b, scaling, kept, has_gate)


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a module that get one input."""


class _Family:
    """Layers that get one input, one after another. The first call computes all, and leaves the others' outputs."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.waiting: dict[LoraLinear, Tensor] = {}
        self.is_whole = True  # until an output was not asked for

    def fits(self, x: Tensor) -> bool:
        """Whether all layers compute their adapters of `x` now, and none drops any of it."""
        return _shares_products(x) and all(_fits(each, x) and not drops(each) for each in self.layers)

    def gated(self, x: Tensor) -> Tensor | None:
        """SwiGLU's product of a gate and its sibling, or None where the kernel cannot compute it."""
        b = [layer.lora_B[ADAPTER].weight for layer in self.layers]
        has_bias = any(layer.base_layer.bias is not None for layer in self.layers)
        if has_bias or b[0].shape != b[1].shape or x.dtype not in HALVES or not self.fits(x):
            return None
        (y,) = _computed(self.layers, x, self.layers[0].scaling[ADAPTER], has_gate=True)
        return y

    def output(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """What `layer` computes of `x`."""
        if x is self.x and layer in self.waiting:
            y = self.waiting.pop(layer)
        else:
            self.is_whole = self.is_whole and not self.waiting
            layers = self.layers if self.is_whole else [layer]
            outputs = _computed(layers, x, layer.scaling[ADAPTER])
            self.waiting = dict(zip(layers, outputs, strict=True))
            y = self.waiting.pop(layer)
        self.x = x if self.waiting else None
        return y


def _family(module: nn.Module, names: Sequence[str]) -> _Family | None:
    """The children of these names, if all have plain adapters of one scale."""
    layers: list[Any] = [getattr(module, each, None) for each in names]
    if not all(map(is_adapted, layers)) or len({each.scaling[ADAPTER] for each in layers}) > 1:
        return None
    return _Family(layers)
