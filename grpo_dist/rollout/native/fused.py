"""A decoding step on a GPU of models built as Llama is, in few kernels.

Matrix products are the libraries'; what lies between two of them is one kernel each (`triton_kernels.py`). Adapters
stay apart from the weights. A layer's first low-rank product is a small product beside the large one, for layers of one
input at once. The second one is part of the kernel that takes the layer's output, which is in float32 there: an update
too small for an output of 16 bits still reaches the sum.

Shapes: R rows, H hidden, V vocabulary, r the largest rank of a layer's adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from ...model.block_attention import cap_scores
from ...model.products import float32_product
from ..room import PAGE
from . import triton_kernels as kernels
from .llama import Gated, Layer, Linear, LlamaWeights, Norm, of_rows, takes_gelu
from .pages import PagePool

RANKS = 8
"""Ranks are filled up to multiples of this with zeros: outputs stay aligned."""
GATE_ROWS, GATE_BLOCK = 16, 128
"""Rows and outputs of a tile in which a gate is computed."""


class Product:
    """Linear layers of one input, computed one by one, and their adapters' first products at once."""

    def __init__(self, *layers: Linear) -> None:
        self.weights, dtype = [layer.weight for layer in layers], layers[0].weight.dtype
        self.rank = -(-max(0 if layer.adapter is None else len(layer.adapter.a) for layer in layers) // RANKS) * RANKS
        self.has_bias = any(layer.bias is not None for layer in layers)
        self.biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
                       for layer in layers]  # fmt: skip
        self.low = torch.cat([_low(layer, self.rank) for layer in layers]).to(dtype)  # (layers · r, inputs)
        self.high = [_high(layer, self.rank).to(dtype) for layer in layers]  # (r, outputs) each

    def __call__(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each layer's outputs (R, outputs) of x (R, inputs), without bias and adapters, and `low` (R, layers · r)."""
        outputs = [_product(x, weight, self.rank) for weight in self.weights]
        return outputs, linear(x, self.low) if self.rank else x


class Stacked:
    """Linear layers of one input as one product, with their adapters' first products behind the outputs."""

    def __init__(self, *layers: Linear) -> None:
        apart = Product(*layers)
        self.rank, self.has_bias, self.bias = apart.rank, apart.has_bias, torch.cat(apart.biases)
        self.weight = torch.cat([*apart.weights, apart.low])
        self.high = torch.cat(apart.high, 1)  # (r, outputs)

    def __call__(self, x: Tensor) -> Tensor:
        """(R, inputs) to (R, outputs + layers · r), without the bias."""
        return _product(x, self.weight, self.rank)


def _product(x: Tensor, weight: Tensor, rank: int) -> Tensor:
    """`x Wᵀ`, in float32 where adapters are added to it."""
    return float32_product(x, weight.T) if rank else linear(x, weight)


def _low(layer: Linear, rank: int) -> Tensor:
    """An adapter's first matrix (rank, inputs), zeros where there is none."""
    if layer.adapter is None:
        return layer.weight.new_zeros((rank, layer.weight.shape[1]))
    return pad(layer.adapter.a, (0, 0, 0, rank - len(layer.adapter.a)))


def _high(layer: Linear, rank: int) -> Tensor:
    """Its second one, scaled, (rank, outputs)."""
    if layer.adapter is None:
        return layer.weight.new_zeros((rank, len(layer.weight)))
    b = layer.adapter.b * layer.adapter.scaling
    return pad(b, (0, rank - b.shape[1])).T.contiguous()


@dataclass(frozen=True)
class Leaving:
    """A layer whose output is not yet added, its input, and the norm of what is added, if there is one. Without a
    layer the input is its output."""

    product: Product | None
    inputs: Tensor
    norm: Norm | None


@dataclass(frozen=True)
class FusedLayer:
    """Attention and feed-forward; the weights of queries, keys and values are copied to be one."""

    layer: Layer
    qkv: Stacked
    output: Product
    feed_forward: tuple[Product, Product] | nn.Module
    """Gate and up, and down; experts are a module."""


def _products(part: Gated | nn.Module) -> tuple[Product, Product] | nn.Module:
    return part if isinstance(part, nn.Module) else (Product(part.gate, part.up), Product(part.down))


class FusedStep:
    """One more token of every row."""

    def __init__(self, model: nn.Module) -> None:
        """Raises as `LlamaWeights`, and ValueError where gates go through what the kernels do not compute."""
        self.weights = weights = LlamaWeights(model)
        gated = [layer.feed_forward for layer in weights.layers if isinstance(layer.feed_forward, Gated)]
        self.is_gelu = takes_gelu(gated)
        self.layers = [FusedLayer(each, Stacked(each.query, each.key, each.value), Product(each.output),
                                  _products(each.feed_forward)) for each in weights.layers]  # fmt: skip
        self.head = Product(weights.head)

    def __call__(self, tokens: Tensor, positions: Tensor, state: PagePool) -> Tensor:
        """Logits (R, V) after `tokens` (R,) int64 at `positions` (R,) int64."""
        weights = self.weights
        x = embedding(tokens, weights.embeddings)
        x = x if weights.embedding_scale == 1 else x * weights.embedding_scale
        turns = weights.rotations(x, positions)
        before: Leaving | None = None
        for each in self.layers:
            layer = each.layer
            query = self._placed(each, _normalised(x, before, layer.input_norm), *turns[layer.kind], state)
            attended = state.attend_rows(layer.number, query, layer.attention)
            inner = _normalised(x, Leaving(each.output, attended.flatten(1), layer.output_norm), layer.mlp_norm)
            if isinstance(each.feed_forward, nn.Module):
                before = Leaving(None, of_rows(each.feed_forward, inner), layer.down_norm)
            else:
                gate_up, down = each.feed_forward
                before = Leaving(down, _gated(gate_up, inner, self.is_gelu), layer.down_norm)
        return self._logits(_normalised(x, before, weights.norm))

    def _logits(self, x: Tensor) -> Tensor:
        """Not rounded to 16 bits, as the trainer's are not."""
        head = self.head
        logits = float32_product(x, head.weights[0].T)
        if head.rank:
            logits += float32_product(linear(x, head.low), head.high[0])
        logits = logits.add_(head.biases[0]) if head.has_bias else logits
        cap = self.weights.logit_cap
        return logits if cap is None else cap_scores(logits, 1.0, cap)

    def _placed(self, each: FusedLayer, x: Tensor, cos: Tensor, sin: Tensor, state: PagePool) -> Tensor:
        """The rotated queries (R, Hq, D); keys and values go to their pages."""
        layer, size, rows = each.layer, self.weights.head_size, len(x)
        queries, heads = layer.query.outputs // size, layer.key.outputs // size
        qkv, keys = each.qkv(x), state.keys[layer.number]
        query = x.new_empty((rows, queries, size))
        norms = layer.query_norm, layer.key_norm
        weights = [qkv if norm is None else norm.weight for norm in norms]
        kernels.rotate_and_store[rows, queries + 2 * heads](
            qkv, each.qkv.high, each.qkv.bias, *weights, cos, sin, query, keys, state.values[layer.number], state.table,
            state.lengths, state.table.shape[1], 0.0 if norms[0] is None else norms[0].eps, HQ=queries, HK=heads,
            D=size, DP=triton.next_power_of_2(size), PAGE=PAGE, RANK=each.qkv.rank, BIAS=each.qkv.has_bias,
            NORM=norms[0] is not None,
        )  # fmt: skip
        return query


def _normalised(x: Tensor, before: Leaving | None, norm: Norm) -> Tensor:
    """RMSNorm of x and the output of the layer `before`, the sum of which is left in x."""
    (rows, size), normed = x.shape, torch.empty_like(x)
    rank, has_bias, y, low, high, bias, added = 0, False, x, x, x, x, None
    if before is not None:
        y, added, product = before.inputs, before.norm, before.product
        if product is not None:
            rank, has_bias, high, bias = product.rank, product.has_bias, product.high[0], product.biases[0]
            (y,), low = product(before.inputs)
    block = triton.next_power_of_2(size)
    kernels.add_and_normalise[(rows,)](
        x, y, low, high, bias, (added or norm).weight, norm.weight, normed, size, (added or norm).eps, norm.eps,
        ADD=before is not None, RANK=rank, BIAS=has_bias, NORM=added is not None, BLOCK=block,
        num_warps=min(16, max(4, block // 1024)),  # a row fits into registers
    )  # fmt: skip
    return normed


def _gated(product: Product, x: Tensor, is_gelu: bool) -> Tensor:
    """The layers gate and up, multiplied (arXiv:2002.05202, equation 6)."""
    (gate, up), low = product(x)
    rows, size = gate.shape
    output = x.new_empty((rows, size))
    kernels.multiply_by_gate[triton.cdiv(rows, GATE_ROWS), triton.cdiv(size, GATE_BLOCK)](
        gate, up, low, *product.high, *product.biases, output, rows, size, RANK=product.rank,
        BIAS=product.has_bias, ROWS=GATE_ROWS, BLOCK=GATE_BLOCK, GELU=is_gelu,
    )  # fmt: skip
    return output
