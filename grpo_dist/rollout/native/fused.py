"""A decoding step on a GPU of models built as Llama is, in few kernels, and the draw of its tokens.

Matrix products are the libraries'; what lies between two of them is one kernel each (`triton_kernels.py`). Adapters
stay apart from the weights: their small product is computed first, and the large one is added to it in the library's
float32 accumulator, so that an update too small for a weight of 16 bits still reaches the sum.

Shapes: R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from ...model.gate_kernel import gated
from ..room import PAGE
from ..sampling import Rules, Sampling, draw, uniforms
from . import triton_kernels as kernels
from .llama import Layer, Linear, Norm, Weights
from .pages import PagePool

VOCABULARY_BLOCK = 1024


@dataclass(frozen=True)
class Product:
    """One or several linear layers of the same input, as one matrix product; with the adapters that lie on them."""

    weight: Tensor
    bias: Tensor | None
    low: Tensor | None
    """The adapters' first matrices, one under another: (sum of ranks, inputs)."""
    high: Tensor | None
    """Their second ones, scaled, each beside the outputs it adds to: (outputs, sum of ranks)."""

    def __call__(self, x: Tensor) -> Tensor:
        """(R, inputs) to (R, outputs), without the bias."""
        if self.low is None or self.high is None:
            return linear(x, self.weight)
        return linear(linear(x, self.low), self.high).addmm_(x, self.weight.T)


def _product(*parts: Linear) -> Product:
    first = parts[0].weight
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([first.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts])
    weight = first if len(parts) == 1 else torch.cat([part.weight for part in parts])
    adapters = [part.adapter for part in parts]
    if not any(adapters):
        return Product(weight, bias, None, None)
    low = torch.cat([each.a for each in adapters if each]).to(first.dtype)
    high = [first.new_zeros((len(part.weight), 0)) if each is None else (each.b * each.scaling).to(first.dtype)
            for part, each in zip(parts, adapters, strict=True)]  # fmt: skip
    return Product(weight, bias, low, torch.block_diag(*high))


@dataclass(frozen=True)
class FusedLayer:
    """Attention and feed-forward; weights that one product can compute are joined."""

    layer: Layer
    qkv: Product
    output: Product
    gate: Product
    up: Product
    down: Product


class FusedStep:
    """One more token of every row."""

    def __init__(self, model: nn.Module) -> None:
        """Raises as `Weights`, and ValueError where a layer computes what the kernels do not."""
        self.weights = weights = Weights(model)
        gates = torch.linspace(-8, 8, 65)
        for layer in weights.layers:
            if not torch.equal(layer.activation(gates), silu(gates)):
                raise ValueError("the activation is not SiLU")
        self.layers = [FusedLayer(each, _product(each.query, each.key, each.value), _product(each.output),
                                  _product(each.gate), _product(each.up), _product(each.down))
                       for each in weights.layers]  # fmt: skip
        self.head = _product(weights.head)

    def __call__(self, tokens: Tensor, positions: Tensor, state: PagePool) -> Tensor:
        """Logits (R, V) after `tokens` (R,) int64 at `positions` (R,) int64."""
        weights = self.weights
        x, y = embedding(tokens, weights.embeddings), None
        cos, sin = (each[0].contiguous() for each in weights.rotary(x, positions[None]))
        for each in self.layers:
            layer = each.layer
            inner = _normalised(x, y, layer.input_norm)
            query = self._placed(each, inner, cos, sin, state)
            y = _with_bias(each.output, each.output(state.attend_rows(layer.number, query, layer.scale).flatten(1)))
            inner = _normalised(x, y, layer.mlp_norm)
            gate, up = (_with_bias(product, product(inner)) for product in (each.gate, each.up))
            y = _with_bias(each.down, each.down(gated(gate, up)))
        x = _normalised(x, y, weights.norm)
        if self.head.low is None and x.is_cuda and x.dtype != torch.float32:  # as the trainer's: not rounded to 16 bits
            return _with_bias(self.head, torch.mm(x, self.head.weight.T, out_dtype=torch.float32))
        return _with_bias(self.head, self.head(x))

    def _placed(self, each: FusedLayer, x: Tensor, cos: Tensor, sin: Tensor, state: PagePool) -> Tensor:
        """The rotated queries (R, Hq, D); keys and values go to their pages."""
        layer, size, rows = each.layer, self.weights.head_size, len(x)
        queries, heads = len(layer.query.weight) // size, len(layer.key.weight) // size
        qkv, keys = each.qkv(x), state.keys[layer.number]
        query = x.new_empty((rows, queries, size))
        norms = layer.query_norm, layer.key_norm
        weights = [qkv if norm is None else norm.weight for norm in norms]
        bias = qkv if each.qkv.bias is None else each.qkv.bias
        kernels.rotate_and_store[rows, queries + 2 * heads](
            qkv, bias, *weights, cos, sin, query, keys, state.values[layer.number], state.table, state.lengths,
            state.table.shape[1], 0.0 if norms[0] is None else norms[0].eps, HQ=queries, HK=heads, D=size,
            DP=triton.next_power_of_2(size), PAGE=PAGE, BIAS=each.qkv.bias is not None, NORM=norms[0] is not None,
        )  # fmt: skip
        return query


def _with_bias(product: Product, y: Tensor) -> Tensor:
    return y if product.bias is None else y.add_(product.bias)


def _normalised(x: Tensor, y: Tensor | None, norm: Norm) -> Tensor:
    """RMSNorm of x + y, which is left in x."""
    rows, size = x.shape
    normed = torch.empty_like(x)
    kernels.add_and_normalise[(rows,)](x, x if y is None else y, norm.weight, normed, size, norm.eps, ADD=y is not None,
                                       BLOCK=triton.next_power_of_2(size))  # fmt: skip
    return normed


def fused_draw(
    logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling, rules: Rules | None = None
) -> tuple[Tensor, Tensor]:
    """`sampling.draw` in two kernels where nothing is truncated or banned."""
    truncates = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
    if sampling.greedy or truncates or (rules is not None and rules.bans):
        return draw(logits, keys, positions, sampling, rules)
    rows, size = logits.shape
    logits, blocks = logits.contiguous(), triton.cdiv(size, VOCABULARY_BLOCK)
    peaks = logits.new_empty((2, rows, blocks), dtype=torch.float32)
    token = torch.empty_like(keys)
    logprob = peaks.new_empty(rows)
    inverse = 1 / sampling.temperature
    kernels.sum_blocks[rows, blocks](logits, peaks[0], peaks[1], size, blocks, inverse, BLOCK=VOCABULARY_BLOCK)
    kernels.draw_token[(rows,)](logits, peaks[0], peaks[1], uniforms(keys, positions), token, logprob, size, blocks,
                                inverse, BLOCK=VOCABULARY_BLOCK, BLOCKS=triton.next_power_of_2(blocks))  # fmt: skip
    return token, logprob
