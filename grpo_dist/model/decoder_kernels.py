"""The decoder layer of `pack.cpp`: all that a layer built as Llama's computes of a pack in float32, with gradients.

Shapes: T tokens, H hidden, F intermediate, Hq query heads, Hk key heads, D head size, r the adapters' rank.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from .pack_kernels import AttentionFields, Sequences, address, call

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
"""The linear layers: of queries, keys, values, attention's output, the gate, what it multiplies, and the product."""


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer with its adapters, or with none."""

    weight: Tensor
    """(outputs, inputs)."""
    bias: Tensor | None
    scaling: float = 0.0
    adapters: tuple[Tensor, Tensor] | None = None
    """A (r, inputs) and B (outputs, r)."""


@dataclass(frozen=True)
class LayerWeights:
    """What a layer computes with."""

    head_size: int
    eps: float
    """Of both norms."""
    scale: float
    """Of the products of queries and keys."""
    window: int | None
    """The newest positions of its sequence that a query sees, its own included; None for all."""
    input_norm: Tensor
    mlp_norm: Tensor
    projections: dict[str, Projection]
    """Of each of PROJECTIONS."""

    def adapted(self) -> list[tuple[str, tuple[Tensor, Tensor]]]:
        """The projections with adapters, in the order of PROJECTIONS, and their A and B."""
        return [(name, each.adapters) for name, each in self.projections.items() if each.adapters is not None]


class _Projection(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("inputs", "outputs", "rank")), ("scaling", c_float),
        *((name, c_void_p) for name in ("weight", "bias", "a", "b", "low", "turned", "grad_low", "grad_a", "grad_b")),
    ]  # fmt: skip


class _Layer(ctypes.Structure):
    """`DecoderLayer` of `decoder_layer.h`, field by field."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "hidden", "inner")), ("eps", c_float),
        *((name, c_void_p) for name in ("input_norm", "mlp_norm", "cos", "sin")), ("attention", AttentionFields),
        *((name, _Projection) for name in PROJECTIONS),
        *((name, c_void_p) for name in ("x", "input_factors", "mlp_factors", "middle", "gates", "ups", "y", "grad",
                                        "grad_x", "grad_middle", "normed", "mlp_normed", "gated", "grad_gates",
                                        "grad_ups")),
    ]  # fmt: skip


def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, sequences: Sequences
) -> tuple[Tensor, dict[str, Tensor]]:
    """A layer's output (T, H) for its input `x` (T, H), with the rotations `cos` and `sin` (T, D), and what the
    gradients are computed from, by the names of the C++ fields."""
    made, tokens = x.new_empty, len(x)
    queries, keys, _, _, inner, *_ = (len(each.weight) for each in weights.projections.values())
    factors, y = made(2, tokens), torch.empty_like(x)
    kept = {
        "x": x, "cos": cos, "sin": sin, "input_factors": factors[0], "mlp_factors": factors[1], "middle": made(x.shape),
        "gates": made(tokens, inner), "ups": made(tokens, inner), "attention.query": made(tokens, queries),
        "attention.key": made(tokens, keys), "attention.value": made(tokens, keys),
        "attention.output": made(tokens, queries), "attention.lse": made(tokens, queries // weights.head_size),
        **{f"{name}.low": made(tokens, len(a)) for name, (a, _) in weights.adapted()},
    }  # fmt: skip
    _run("decoder_layer", weights, sequences, kept | {"y": y} | _turned(weights))
    return y, kept


def decoder_layer_backward(
    grad: Tensor, kept: dict[str, Tensor], weights: LayerWeights, sequences: Sequences, of_input: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """For the gradient by the output (T, H), that by the input, if it is asked for, and those by A and B of each
    projection that has them."""
    like = torch.empty_like
    x, gates, query, key = (kept[name] for name in ("x", "gates", "attention.query", "attention.key"))
    grad_x = like(x) if of_input else None
    sums = key.new_empty(2, sequences.sums, key.shape[1])
    of_adapters = {f"{name}.grad_{matrix}": like(each) for name, adapters in weights.adapted()
                   for matrix, each in zip("ab", adapters, strict=True)}  # fmt: skip
    _run("decoder_layer_backward", weights, sequences, kept | of_adapters | _turned(weights) | {
        "grad": grad, "grad_middle": like(x), "normed": like(x), "mlp_normed": like(x), "gated": like(gates),
        "grad_gates": like(gates), "grad_ups": like(gates), "attention.grad": like(query),
        "attention.grad_query": like(query), "attention.grad_key": like(key), "attention.grad_value": like(key),
        "attention.key_sums": sums[0], "attention.value_sums": sums[1],
        **{f"{name}.grad_low": like(kept[f"{name}.low"]) for name, _ in weights.adapted()},
        **({} if grad_x is None else {"grad_x": grad_x}),
    })  # fmt: skip
    return grad_x, list(of_adapters.values())


def _turned(weights: LayerWeights) -> dict[str, Tensor]:
    """Room for each B transposed."""
    return {f"{name}.turned": torch.empty_like(b) for name, (_, b) in weights.adapted()}


def _run(name: str, weights: LayerWeights, sequences: Sequences, tensors: dict[str, Tensor]) -> None:
    heads = (tensors[f"attention.{part}"].shape[1] // weights.head_size for part in ("query", "key"))
    window = sequences.longest if weights.window is None else weights.window
    layer = _Layer(*tensors["x"].shape, tensors["gates"].shape[1], weights.eps, address(weights.input_norm),
                   address(weights.mlp_norm))  # fmt: skip
    layer.attention = AttentionFields(
        *heads, weights.head_size, len(sequences.segments), len(sequences.runs), sequences.longest, sequences.sums,
        window, weights.scale, address(sequences.segments), address(sequences.runs),
    )  # fmt: skip
    for part, projection in weights.projections.items():
        outputs, inputs = projection.weight.shape
        a, b = projection.adapters or (None, None)
        setattr(layer, part, _Projection(
            inputs, outputs, 0 if a is None else len(a), projection.scaling,
            *(0 if each is None else address(each) for each in (projection.weight, projection.bias, a, b)),
        ))  # fmt: skip
    parts = {part: getattr(layer, part) for part in ("attention", *PROJECTIONS)} | {"": layer}
    for place, x in tensors.items():
        part, _, field = place.rpartition(".")
        setattr(parts[part], field, address(x))
    call(name, layer)
