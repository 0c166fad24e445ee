"""Frozen linear layers whose weights are stored in 4 or 8 bits (QLoRA, arXiv:2305.14314). Pure.

bitsandbytes quantises (`quantization.py`); here is what computes with the result. A product dequantises the weight, and
so does its backward pass, so that no dense weight stays in memory between the two. It consists of torch's operations:
the same in training and in evaluation, on a CPU and on a GPU.

All tensors of such a layer are integers, the scales as the bits of float32 numbers. Casting a model, as DeepSpeed does,
therefore leaves them alone.

Shapes: O outputs, I inputs, B blocks of weights.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, linear


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (O, I) as it is computed with: whole numbers, and a scale for each `block` of them."""

    codes: Tensor
    """(O · I,) int8; or, where they name `values`, uint8 with two codes each, the first in the high half."""
    scales: Tensor
    """(B,) float32."""
    values: Tensor | None
    """(16,) float32."""
    block: int
    shape: tuple[int, int]
    dtype: torch.dtype
    """Of the numbers that it stands for."""

    def dequantized(self) -> Tensor:
        """(O, I) in `dtype`."""
        if self.values is None:
            numbers = self.codes.float()
        else:
            pairs = torch.stack([self.values.repeat_interleave(16), self.values.repeat(16)], 1)
            numbers = embedding(self.codes.int(), pairs)
        dense = numbers.view(-1, self.block).mul_(self.scales[:, None]).view(-1)
        return dense[: self.shape[0] * self.shape[1]].to(self.dtype).view(self.shape)

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """As weights of so many outputs each. Raises ValueError where one begins within a block."""
        parts, begin, inputs = [], 0, self.shape[1]
        for size in sizes:
            first, past = begin * inputs, (begin + size) * inputs
            if first % self.block or past % self.block:
                raise ValueError(f"outputs {begin} to {begin + size} of {inputs} inputs in blocks of {self.block}")
            a_code = 1 if self.values is None else 2
            parts.append(replace(self, codes=self.codes[first // a_code : past // a_code], shape=(size, inputs),
                                 scales=self.scales[first // self.block : past // self.block]))  # fmt: skip
            begin += size
        return parts


class LayerShape(NamedTuple):
    """What a quantised layer has of the plain one."""

    in_features: int
    out_features: int
    bias: Tensor | None
    dtype: torch.dtype
    """That of the computation."""
    is_transposed: bool
    """Whether the plain layer stores (I, O), as GPT-2's do."""


class QuantizedLinear(nn.Linear, ABC):
    """`x Wᵀ + bias` with a stored W that is not a parameter. Subclasses store it."""

    def __init__(self, shape: LayerShape) -> None:
        nn.Module.__init__(self)  # without nn.Linear's parameter `weight`
        self.in_features, self.out_features, bias, self.dtype, self.is_transposed = shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @abstractmethod
    def stored(self) -> QuantizedWeight:
        """The weight, with scales of one number each."""

    def dequantized(self) -> Tensor:
        """The weight (O, I) in `dtype`."""
        return self.stored().dequantized()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, dequantised at each access."""
        return self.dequantized()

    def plain(self) -> nn.Linear:
        """A plain layer of this shape, on the meta device."""
        sizes = self.in_features, self.out_features
        return nn.Linear(*sizes, self.bias is not None, "meta", self.dtype).requires_grad_(False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored weight."""
        return sum(p.nbytes for name, p in self.named_parameters() if name != "bias")

    def blank(self) -> QuantizedLinear:
        """The same layer on the meta device."""
        empty = {id(p): _frozen(torch.empty_like(p, device="meta")) for p in self.parameters()}
        return copy.deepcopy(self, empty)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) to (…, O)."""
        return _FrozenProduct.apply(x.to(self.dtype), self)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dequantized(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad @ ctx.layer.dequantized() if ctx.needs_input_grad[0] else None), None


class FourBitLinear(QuantizedLinear):
    """Two weights a byte; each names one of 16 values, which is scaled by the largest magnitude of its block."""

    def __init__(self, shape: LayerShape, *, codes: Tensor, values: Tensor, scales: Scales, block: int) -> None:
        """`codes` (B · block / 2,) uint8, the first weight of a pair in the high half, rows of W one after another;
        `values` (16,) float32; `block` is the number of weights that share a scale."""
        super().__init__(shape)
        self.block = block
        self.codes, self.values = _frozen(codes), _frozen(_bits(values))
        self.scales = scales

    def stored(self) -> QuantizedWeight:
        """See `QuantizedLinear`."""
        shape = self.out_features, self.in_features
        return QuantizedWeight(self.codes, self.scales.all(), _floats(self.values), self.block, shape, self.dtype)


class Scales(nn.Module):
    """Scales (B,) float32, or 8-bit numbers for them in blocks of their own (double quantisation)."""

    def __init__(
        self, stored: Tensor, *, values: Tensor | None = None, scales: Tensor | None = None,
        offset: Tensor | None = None, block: int = 1,
    ) -> None:  # fmt: skip
        """`stored` (B,) is float32; or uint8 with `values` (256,) that it names, the `scales` of its blocks of `block`
        numbers, and the `offset` (1,) that is added, all float32."""
        super().__init__()
        self.block = block
        self.stored = _frozen(stored if values is not None else _bits(stored))
        for name, tensor in (("values", values), ("scales", scales), ("offset", offset)):
            self.register_parameter(name, None if tensor is None else _frozen(_bits(tensor)))

    def all(self) -> Tensor:
        """(B,) float32."""
        if self.values is None:
            return _floats(self.stored)
        scales = _floats(self.scales).repeat_interleave(self.block)[: len(self.stored)]
        return _floats(self.values)[self.stored.int()].mul_(scales).add_(_floats(self.offset))


class EightBitLinear(QuantizedLinear):
    """A byte a weight, with a scale for each output."""

    def __init__(self, shape: LayerShape, *, codes: Tensor, scales: Tensor) -> None:
        """`codes` (O, I) int8; `scales` (O,) float32, what a code of 1 stands for."""
        super().__init__(shape)
        self.codes, self.scales = _frozen(codes), _frozen(_bits(scales))

    def stored(self) -> QuantizedWeight:
        """See `QuantizedLinear`."""
        outputs, inputs = self.codes.shape
        return QuantizedWeight(self.codes.view(-1), _floats(self.scales), None, inputs, (outputs, inputs), self.dtype)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """A model's quantised layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype of a linear layer's weight, dequantised where it is stored otherwise."""
    return layer.dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype


def dequantize_layers(model: nn.Module) -> None:
    """Replace a model's quantised layers by plain ones with the same values, for a model that only decodes."""
    for name, layer in quantized_layers(model).items():
        plain = layer.plain()
        plain.weight, plain.bias = _frozen(layer.weight), layer.bias
        model.set_submodule(name, plain)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.float().reshape(-1).view(torch.int32)  # DeepSpeed sends no tensor without dimensions


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)
