"""Adapters on experts whose weights are one tensor, computed apart from it.

PEFT adds `scaling · B A` to the weights of all experts before it uses them, in their dtype. In 16 bits this rounds most
of a small update away, and it takes a second tensor of their size. Here the product of each expert gets its adapter's,
as in a linear layer: `x Wᵀ + scaling (x Aᵀ) Bᵀ`. The experts' own code computes one expert after another, and finds in
place of its weight one that does this. Parameters, names and files are PEFT's.

Shapes: E experts, I inputs, O outputs, r rank. Some models have weights (E, O, I), and others (E, I, O).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._nn import linear  # torch.nn.functional.linear itself, which ZeRO-3 replaces
from torch.nn import functional

from ..distributed.sharding import full_shape, gather_with
from .checks import matches
from .lora import adapted_linear, fuse_adapters
from .names import no_experts
from .peft import ADAPTER, LoraLayer, ParamWrapper

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
"""`x @ W`, in models whose weights are (E, I, O)."""


class _Matrix:
    """The weight of one expert, which is only multiplied with."""

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
        """`weight` (O, I) or (I, O); see `factors`."""
        self.weight, self.left, self.right, self.scaling = weight, left, right, scaling

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Tensor:
        if kwargs or func not in (linear, *PRODUCTS) or not isinstance(args[1], _Matrix):
            raise TypeError(f"{func} of an expert's weight with adapters, expected a product from its left")
        x, matrix, *bias = args
        weight, a, b = matrix.weight, matrix.right, matrix.left
        if func is not linear:
            weight, a, b = weight.T, b.T, a.T
        return adapted_linear(x, weight, bias[0] if bias else None, a, b, matrix.scaling)


class _Weights:
    """The weights of all experts, which are only indexed."""

    def __init__(self, layer: ParamWrapper) -> None:
        self.weights, (self.left, self.right) = layer.get_param(), factors(layer)
        self.scaling = layer.scaling[ADAPTER]

    def __getitem__(self, expert: int | Tensor) -> _Matrix:
        return _Matrix(self.weights[expert], self.left[expert], self.right[expert], self.scaling)


def factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """What a layer's adapters add to its weight is `scaling` times the product of these, (E, rows, r) and
    (E, r, columns); E is 1 for a linear layer."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    if not isinstance(layer, ParamWrapper):
        return b[None], a[None]
    a, b = a.unflatten(0, (layer.num_experts, -1)), b.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)
    # PEFT takes the rows of a weight for its inputs, older releases also where they are its outputs
    return (b, a) if getattr(layer, "_did_swap_in_out_features", False) else (a.mT, b.mT)


def adapted_weight(layer: LoraLayer) -> nn.Parameter:
    """The weight that a layer's adapters are for."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight


def of_experts(layer: LoraLayer) -> str:
    """What follows the name of a layer in that of the experts' tensor that its adapters are for; else nothing."""
    return f".{layer.parameter_name}" if isinstance(layer, ParamWrapper) else ""


def delta_weight(layer: LoraLayer) -> Tensor:
    """What a layer's adapters add to its weight, of the weight's shape, in float32."""
    if not isinstance(layer, ParamWrapper):
        return layer.get_delta_weight(ADAPTER).float()
    left, right = (factor.float() for factor in factors(layer))
    return (left @ right) * layer.scaling[ADAPTER]


def expert_parameters(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The parameters of the model that `names` mean, each a name or the end of one, as PEFT takes them.

    Raises UnfitModel for a name that means no tensor of several experts.
    """
    chosen = []
    own = {name for name, p in model.named_parameters() if len(full_shape(p)) == 3}
    for each in names:
        meant = [name for name, _ in model.named_parameters() if matches(name, each, False)]
        if not set(meant) & own:
            expected = {".".join(name.split(".")[-3:]) for name in own}
            reason = "is no tensor of several experts" if meant else "is no parameter of it"
            raise no_experts(each, reason, type(model).__name__, expected)
        chosen += [name for name in meant if name in own]
    return chosen


def compute_adapters_apart(model: nn.Module) -> None:
    """Let linear layers and experts compute their adapters apart from their weights: in 16 bits PEFT's own addition
    loses small updates. Policy, rollout and a reopened model do so alike."""
    fuse_adapters(model)
    _fuse_expert_adapters(model)


def _fuse_expert_adapters(model: nn.Module) -> None:
    """Let experts with adapters compute these apart, one expert after another."""
    layers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(layer.base_layer) for layer in layers}
    for layer in layers:
        if id(layer) not in inner:  # one for each tensor, each within the next
            layer.forward = _apart(layer)
            layer.register_forward_pre_hook(_with_adapters)
            layer.get_base_layer().config._experts_implementation = "eager"


def _nested(outer: ParamWrapper) -> list[ParamWrapper]:
    layers = [outer]
    while isinstance(layers[-1].base_layer, ParamWrapper):
        layers.append(layers[-1].base_layer)
    return layers


def _with_adapters(outer: ParamWrapper, _: Any) -> None:
    """ZeRO-3 gathers a weight in the call of its own module, and those of the adapters are never called."""
    own = [each[ADAPTER].weight for layer in _nested(outer) for each in (layer.lora_A, layer.lora_B)]
    gather_with(outer, own)


def _apart(outer: ParamWrapper) -> Callable[..., Any]:
    experts, layers = outer.get_base_layer(), _nested(outer)

    def forward(*inputs: Any, **options: Any) -> Any:
        if outer.disable_adapters:
            return experts(*inputs, **options)
        _let_linear_dispatch()
        with _in_place_of(experts, {layer.parameter_name: _Weights(layer) for layer in layers}):
            return experts(*inputs, **options)

    return forward


def _let_linear_dispatch() -> None:
    """ZeRO-3 has put a function in place of torch's `linear` that computes with tensors alone: let it know matrices."""
    plain = functional.linear
    if plain is linear or hasattr(plain, "knows_matrices"):
        return

    def dispatching(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return (linear if isinstance(weight, _Matrix) else plain)(x, weight, bias)

    dispatching.knows_matrices = True  # type: ignore[attr-defined]
    functional.linear = dispatching  # type: ignore[assignment]


@contextmanager
def _in_place_of(experts: nn.Module, weights: dict[str, _Weights]) -> Iterator[None]:
    """Inside, the experts' code finds these under the names of its parameters, which stay what they are."""
    experts.__dict__.update(weights)
    try:
        yield
    finally:
        for name in weights:
            del experts.__dict__[name]
