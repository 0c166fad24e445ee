"""A decoding step of models built as Llama is (Qwen, Mistral and many others), in as few operations as it takes.

transformers' modules spend more operations, and more Python around them, than a step of a few tokens computes. This
is the same function on the same weights, with numbers rounded at the same places. Whether it is the same for a given
model is asked of that model (`rollout/choose.py`); one that is built in another way decodes through its own modules.

Shapes: R sequences, H hidden, Hq query heads, Hk key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm

from ...model.lora import add_low_rank
from .cache import DecodeState

PARTS = {
    "model": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layer": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
"""The modules that such a model consists of; an attention may also have q_norm and k_norm, as Qwen3's."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv:1910.07467, equation 4)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


@dataclass(frozen=True)
class Adapter:
    """What low-rank adapters add to a layer's outputs, `scaling · (x Aᵀ) Bᵀ` (LoRA, arXiv:2106.09685, equation 3)."""

    a: Tensor
    """(r, inputs), in the dtype it is trained in."""
    b: Tensor
    """(outputs, r)."""
    scaling: float


@dataclass(frozen=True)
class Linear:
    """A linear layer, perhaps with a bias, perhaps with adapters."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None = None

    def merged(self) -> Tensor:
        """The weight with the adapters added; in float32 nothing that counts is lost to rounding."""
        if self.adapter is None:
            return self.weight
        a, b = self.adapter.a.to(self.weight.dtype), self.adapter.b.to(self.weight.dtype)
        return torch.addmm(self.weight, b, a, alpha=self.adapter.scaling)


class Joint:
    """Linear layers that read the same input; what their adapters make of it is computed at once."""

    def __init__(self, *layers: Linear) -> None:
        self.layers, dtype = layers, layers[0].weight.dtype
        adapters = [layer.adapter for layer in layers if layer.adapter is not None]
        self.inward = torch.cat([adapter.a.to(dtype) for adapter in adapters]).T if adapters else None
        self.outward = [(adapter.b * adapter.scaling).to(dtype) for adapter in adapters]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Each layer's outputs (R, outputs) of x (R, inputs)."""
        if self.inward is None:
            return [linear(x, layer.weight, layer.bias) for layer in self.layers]
        outward = iter(zip((x @ self.inward).split([b.shape[1] for b in self.outward], 1), self.outward, strict=True))
        return [linear(x, layer.weight, layer.bias) if layer.adapter is None else
                add_low_rank(x, layer.weight, layer.bias, *next(outward)) for layer in self.layers]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Attention and feed-forward."""

    number: int
    scale: float
    input_norm: Norm
    mlp_norm: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    gate: Linear
    up: Linear
    down: Linear
    activation: nn.Module


class Weights:
    """The weights that a model has when this is made, by what they do."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError, AttributeError or TypeError for a model that is built in another way."""
        base, head = model.base_model, model.get_output_embeddings()
        _expect(base, PARTS["model"])
        self.embeddings, self.rotary, self.norm = base.embed_tokens.weight, base.rotary_emb, _norm(base.norm)
        self.head_size: int = base.layers[0].self_attn.head_dim
        self.layers = [_layer(layer) for layer in base.layers]
        self.head = linear_of(head)


class LlamaStep:
    """One more token of every sequence, in torch's operations."""

    def __init__(self, model: nn.Module) -> None:
        """Raises as `Weights`."""
        self.weights = Weights(model)
        self.layers = [
            (layer, Joint(layer.query, layer.key, layer.value), Joint(layer.output), Joint(layer.gate, layer.up),
             Joint(layer.down)) for layer in self.weights.layers
        ]  # fmt: skip
        self.head = Joint(self.weights.head)

    def __call__(self, tokens: Tensor, positions: Tensor, state: DecodeState) -> Tensor:
        """Logits (R, V) after `tokens` (R,) int64 at `positions` (R,) int64."""
        weights, half = self.weights, self.weights.head_size // 2
        x = embedding(tokens, weights.embeddings)
        cos, sin = weights.rotary(x, positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        turn = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for layer, inward, outward, gate_up, down in self.layers:
            query, key, value = (each.view(len(x), -1, weights.head_size) for each in inward(layer.input_norm(x)))
            x = x + outward(self._attention(layer, query, key, value, turn, state))[0]
            gate, up = gate_up(layer.mlp_norm(x))
            x = x + down(layer.activation(gate) * up)[0]
        return self.head(weights.norm(x))[0]

    def _attention(
        self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, turn: tuple[Tensor, Tensor], state: DecodeState
    ) -> Tensor:
        query = query if layer.query_norm is None else layer.query_norm(query)
        key = key if layer.key_norm is None else layer.key_norm(key)
        output = state.attend_rows(layer.number, _turned(query, turn), _turned(key, turn), value, layer.scale)
        return output.flatten(1)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864, equation 34, with halves in place of pairs) of (R, heads, D)."""
    cos, signed_sin = turn
    return x * cos + torch.roll(x, x.shape[-1] // 2, -1) * signed_sin


def _layer(module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    _expect(module, PARTS["layer"])
    _expect(attention, PARTS["attention"], {"q_norm", "k_norm"})
    _expect(mlp, PARTS["mlp"])
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        attention.layer_idx, attention.scaling, _norm(module.input_layernorm), _norm(module.post_attention_layernorm),
        linear_of(attention.q_proj), linear_of(attention.k_proj), linear_of(attention.v_proj),
        linear_of(attention.o_proj),
        None if q_norm is None else _norm(q_norm), None if k_norm is None else _norm(k_norm),
        linear_of(mlp.gate_proj), linear_of(mlp.up_proj), linear_of(mlp.down_proj), mlp.act_fn,
    )  # fmt: skip


def _expect(module: nn.Module, names: set[str], extra: Set[str] = frozenset()) -> None:
    children = {name for name, _ in module.named_children()}
    if not names <= children <= names | extra:
        raise ValueError(f"{type(module).__name__} consists of {sorted(children)}, expected {sorted(names)}")


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def linear_of(module: Any) -> Linear:
    """A module's weights. Raises ValueError where it is no linear layer, with adapters or without."""
    base, adapter = module, None
    if isinstance(module, LoraLinear):
        base = module.base_layer
        adapter = Adapter(module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"])
    if not isinstance(base, nn.Linear):
        raise ValueError(f"{type(base).__name__} is not a plain linear layer")
    return Linear(base.weight, base.bias, adapter)
