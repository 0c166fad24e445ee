"""A decoding step of models built as Llama is (Qwen, Mistral, Gemma, Phi and many others), in few operations.

transformers' modules spend more operations, and more Python around them, than a step of a few tokens computes. This
is the same function on the same weights, with numbers rounded at the same places. Whether it is the same for a given
model is asked of that model (`rollout/choose.py`); one that is built in another way decodes through its own modules.

Shapes: R sequences, H hidden, Hq query heads, Hk key heads, D head size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, linear, rms_norm, silu

from ...model.block_attention import cap_scores
from ...model.layout import AttentionOptions
from ...model.lora import add_low_rank
from ...model.peft import ADAPTER, LoraLinear
from ...model.quantized import QuantizedLinear, QuantizedWeight
from .cache import DecodeState

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

MODEL = ["embed_tokens", "layers", "norm"]
LAYER = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
FEED_FORWARD_NORMS = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
"""With these, as in Gemma, each part of a layer has a norm in front of it and one behind it."""
PROJECTIONS = (["q_proj", "k_proj", "v_proj"], ["qkv_proj"])
HEAD_NORMS = ["q_norm", "k_norm"]
GATES = (["gate_proj", "up_proj"], ["gate_up_proj"])
"""What such a model consists of; layers of one input may be apart, as in Llama, or one, as in Phi-3."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv:1910.07467, equation 4)."""

    weight: Tensor
    """In float32 the product is rounded, in another dtype it is made of what is rounded."""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32:
            return rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)
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

    stored: Tensor | QuantizedWeight
    bias: Tensor | None
    adapter: Adapter | None = None

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs); of a quantised layer it is dequantised at each access."""
        return self.stored if isinstance(self.stored, Tensor) else self.stored.dequantized()

    @property
    def outputs(self) -> int:
        """Numbers that it makes of a token."""
        return self.stored.shape[0]

    def merged(self) -> Tensor:
        """The weight with the adapters added; in float32 nothing that counts is lost to rounding."""
        if self.adapter is None:
            return self.weight
        a, b = self.adapter.a.to(self.weight.dtype), self.adapter.b.to(self.weight.dtype)
        return torch.addmm(self.weight, b, a, alpha=self.adapter.scaling)

    def split(self, sizes: Sequence[int]) -> list[Linear]:
        """As layers of so many outputs each. Raises RuntimeError where they do not add up, and ValueError where blocks
        of a quantised weight would be divided."""
        weights, no_bias = self.stored.split(sizes), [None] * len(sizes)
        biases = no_bias if self.bias is None else self.bias.split(sizes)
        if self.adapter is None:
            return [Linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        adapters = [Adapter(self.adapter.a, b, self.adapter.scaling) for b in self.adapter.b.split(sizes)]
        return [Linear(*parts) for parts in zip(weights, biases, adapters, strict=True)]


class Joint:
    """Linear layers that read the same input; what their adapters make of it is computed at once."""

    def __init__(self, *layers: Linear) -> None:
        self.layers, dtype = layers, layers[0].stored.dtype
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
class Gated:
    """A feed-forward part with a gate (arXiv:2002.05202, equation 6)."""

    gate: Linear
    up: Linear
    down: Linear
    activation: nn.Module


@dataclass(frozen=True)
class Layer:
    """Attention and feed-forward."""

    number: int
    kind: str | None
    """Which of the model's rotations it takes; None where there is one."""
    attention: AttentionOptions
    input_norm: Norm
    output_norm: Norm | None
    """Of what attention adds."""
    mlp_norm: Norm
    down_norm: Norm | None
    """Of what the feed-forward part adds."""
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    feed_forward: Gated | nn.Module
    """Experts are a module."""


class LlamaWeights:
    """The weights that a model has when this is made, by what they do."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError, AttributeError, TypeError or RuntimeError for a model that is built in another way."""
        base, text = model.get_decoder(), model.config.get_text_config()
        _expect(base, MODEL)
        self.embeddings, self._rotary = base.embed_tokens.weight, base.rotary_emb
        residual, logit_divisor = getattr(text, "residual_multiplier", 1.0), getattr(text, "logits_scaling", 1.0)
        self.norm = _residual_norm(base.norm, residual)
        if logit_divisor != 1:  # Granite's, which the head's input may be divided by as well
            self.norm = replace(self.norm, weight=self.norm.weight.float() / logit_divisor)
        # older releases of transformers multiply Gemma's embeddings outside their module
        implied = self.embeddings.shape[1] ** 0.5 if text.model_type in ("gemma", "gemma2") else 1.0
        scale = torch.as_tensor(getattr(base.embed_tokens, "embed_scale", implied))
        scale = scale.to(self.embeddings.dtype) * getattr(text, "embedding_multiplier", 1.0)
        self.embedding_scale = float(scale) / residual
        self.logit_cap: float | None = getattr(text, "final_logit_softcapping", None)
        self.head_size: int = base.layers[0].self_attn.head_dim
        has_kinds = "layer_type" in inspect.signature(base.rotary_emb.forward).parameters
        self.layers = [_layer(layer, text, has_kinds, residual) for layer in base.layers]
        self.kinds = sorted({layer.kind for layer in self.layers}, key=str)
        self.head = linear_of(model.get_output_embeddings())

    def rotations(self, x: Tensor, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cosines and sines (R, D) in the dtype of `x`, for each kind of layers."""
        turns = {kind: self._rotary(x, positions[None], *([] if kind is None else [kind])) for kind in self.kinds}
        # gpt-oss has those of one half of a head, which are the other's too
        if 2 * turns[self.kinds[0]][0].shape[-1] == self.head_size:
            return {kind: (cos[0].repeat(1, 2), sin[0].repeat(1, 2)) for kind, (cos, sin) in turns.items()}
        return {kind: (cos[0].contiguous(), sin[0].contiguous()) for kind, (cos, sin) in turns.items()}


class LlamaStep:
    """One more token of every sequence, in torch's operations."""

    def __init__(self, model: nn.Module) -> None:
        """Raises as `LlamaWeights`."""
        self.weights = LlamaWeights(model)
        self.layers = [
            (layer, Joint(layer.query, layer.key, layer.value), Joint(layer.output), _feed_forward(layer.feed_forward))
            for layer in self.weights.layers
        ]
        self.head = Joint(self.weights.head)

    def __call__(self, tokens: Tensor, positions: Tensor, state: DecodeState) -> Tensor:
        """Logits (R, V) after `tokens` (R,) int64 at `positions` (R,) int64."""
        weights, half = self.weights, self.weights.head_size // 2
        x = embedding(tokens, weights.embeddings)
        x = x if weights.embedding_scale == 1 else x * weights.embedding_scale
        turns = {
            kind: (cos[:, None], torch.cat([-sin[:, None, :half], sin[:, None, half:]], -1))
            for kind, (cos, sin) in weights.rotations(x, positions).items()
        }
        for layer, inward, outward, feed_forward in self.layers:
            query, key, value = (each.view(len(x), -1, weights.head_size) for each in inward(layer.input_norm(x)))
            attended = outward(self._attention(layer, query, key, value, turns[layer.kind], state))[0]
            x = x + (attended if layer.output_norm is None else layer.output_norm(attended))
            inner = feed_forward(layer.mlp_norm(x))
            x = x + (inner if layer.down_norm is None else layer.down_norm(inner))
        logits = self.head(weights.norm(x))[0]
        return logits if weights.logit_cap is None else cap_scores(logits, 1.0, weights.logit_cap)

    def _attention(
        self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, turn: tuple[Tensor, Tensor], state: DecodeState
    ) -> Tensor:
        query = query if layer.query_norm is None else layer.query_norm(query)
        key = key if layer.key_norm is None else layer.key_norm(key)
        output = state.attend_rows(layer.number, _turned(query, turn), _turned(key, turn), value, layer.attention)
        return output.flatten(1)


def _feed_forward(part: Gated | nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(part, nn.Module):
        return partial(of_rows, part)
    gate_up, down = Joint(part.gate, part.up), Joint(part.down)

    def gated(x: Tensor) -> Tensor:
        gate, up = gate_up(x)
        return down(part.activation(gate) * up)[0]

    return gated


def of_rows(module: nn.Module, x: Tensor) -> Tensor:
    """What a module, which may say more than its output, makes of a sequence of the rows of x (R, H)."""
    output = module(x[None])
    return (output[0] if isinstance(output, tuple) else output)[0]


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864, equation 34, with halves in place of pairs) of (R, heads, D)."""
    cos, signed_sin = turn
    return x * cos + torch.roll(x, x.shape[-1] // 2, -1) * signed_sin


def _layer(module: nn.Module, text: PreTrainedConfig, has_kinds: bool, residual: float) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    has_more_norms, has_head_norms = hasattr(module, FEED_FORWARD_NORMS[0]), hasattr(attention, HEAD_NORMS[0])
    projections = next((names for names in PROJECTIONS if hasattr(attention, names[0])), PROJECTIONS[0])
    _expect(module, LAYER + FEED_FORWARD_NORMS * has_more_norms)
    _expect(attention, [*projections, "o_proj"] + HEAD_NORMS * has_head_norms)
    output, inward = linear_of(attention.o_proj), [linear_of(getattr(attention, name)) for name in projections]
    if len(inward) == 1:
        queries = output.stored.shape[1]
        inward = inward[0].split([queries, *[(inward[0].outputs - queries) // 2] * 2])
    behind = module.post_attention_layernorm
    query, key, value = inward
    return Layer(
        number=attention.layer_idx,
        kind=attention.layer_type if has_kinds else None,
        attention=AttentionOptions(
            attention.scaling,
            # where attention does not say, as in Mistral, the config holds for all layers
            getattr(attention, "sliding_window", getattr(text, "sliding_window", None)),
            getattr(attention, "attn_logit_softcapping", None),
            getattr(attention, "sinks", None),
        ),
        input_norm=_residual_norm(module.input_layernorm, residual),
        output_norm=_norm(behind) if has_more_norms else None,
        mlp_norm=_residual_norm(module.pre_feedforward_layernorm if has_more_norms else behind, residual),
        down_norm=_norm(module.post_feedforward_layernorm) if has_more_norms else None,
        query=query, key=key, value=value, output=output,
        query_norm=_norm(attention.q_norm) if has_head_norms else None,
        key_norm=_norm(attention.k_norm) if has_head_norms else None,
        feed_forward=_gated(mlp),
    )  # fmt: skip


def _gated(mlp: nn.Module) -> Gated | nn.Module:
    gates = next((names for names in GATES if hasattr(mlp, names[0])), None)
    if gates is None:
        return mlp
    _expect(mlp, [*gates, "down_proj"])
    gate_up = [linear_of(getattr(mlp, name)) for name in gates]
    if len(gate_up) == 1:
        gate_up = gate_up[0].split([gate_up[0].outputs // 2] * 2)
    gate, up = gate_up
    return Gated(gate, up, linear_of(mlp.down_proj), mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn)


def takes_gelu(parts: Sequence[Gated]) -> bool:
    """Whether gates go through GELU's approximation by tanh (arXiv:1606.08415, section 2) or through SiLU. Raises
    ValueError where they go through something else, or where layers differ."""
    gates = torch.linspace(-8, 8, 65)
    for is_gelu, expected in ((False, silu(gates)), (True, gelu(gates, approximate="tanh"))):
        if all(torch.allclose(part.activation(gates), expected, atol=1e-6) for part in parts):
            return is_gelu
    raise ValueError("the activation is neither SiLU nor GELU's approximation by tanh, the same in all layers")


def _expect(module: nn.Module, names: list[str]) -> None:
    """Modules that compute nothing of their own, as activations and dropout, may be there, too."""
    children = {name for name, child in module.named_children() if _has_parameters(child)}
    if children != set(names):
        raise ValueError(f"{type(module).__name__} consists of {sorted(children)}, expected {sorted(names)}")


def _has_parameters(module: nn.Module) -> bool:
    # `parameters()` lists all modules first
    return any(each is not None for part in module.modules() for each in part._parameters.values())


def _norm(module: nn.Module) -> Norm:
    """Gemma's norms hold what their factor is above 1, and name their eps as it is."""
    if hasattr(module, "variance_epsilon"):
        return Norm(module.weight, module.variance_epsilon)
    return Norm(1 + module.weight.float(), module.eps)


def _residual_norm(module: nn.Module, multiplier: float) -> Norm:
    """A norm of what layers add to, where the model multiplies what they add.

    All of that is divided by the multiplier here, so that it need not be multiplied: a norm sees the same numbers but
    for its eps.
    """
    norm = _norm(module)
    return replace(norm, eps=norm.eps / multiplier**2)


def linear_of(module: nn.Module) -> Linear:
    """A module's weights. Raises ValueError where it is no linear layer, with adapters or without."""
    base, adapter = module, None
    if isinstance(module, LoraLinear):
        base = module.base_layer
        if not module.disable_adapters:
            adapter = Adapter(module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.scaling[ADAPTER])
    if not isinstance(base, nn.Linear):
        raise ValueError(f"{type(base).__name__} is not a plain linear layer")
    return Linear(base.stored() if isinstance(base, QuantizedLinear) else base.weight, base.bias, adapter)
