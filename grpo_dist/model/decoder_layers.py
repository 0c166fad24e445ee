"""Decoder layers built as Llama's as one operation on a pack in float32 on a CPU: `decoder_kernels.py`.

A layer of transformers is recognised by what it computes, in a trial on a few numbers. Its own code runs wherever a
call has anything that the operation does not know.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm, silu

from ..distributed.sharding import gather_with, is_whole
from . import pack_kernels
from .attention import RowLayout
from .block_attention import block_layout
from .decoder_kernels import PROJECTIONS, LayerWeights, Projection, decoder_layer, decoder_layer_backward
from .fused_modules import GATED, Product, is_plain, turned
from .layout import AttentionOptions
from .lora import drops, is_adapted
from .pack_kernels import MULTIPLE, Sequences
from .peft import ADAPTER

PARTS = {
    "": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": GATED,
}
"""The children of a layer, and of those among them that have any."""
UNUSED = {"attention_mask", "position_ids", "cache_position"}
"""Arguments of a layer that say nothing which its layout and its rotations do not."""
MOST_NUMBERS = 1 << 20
"""Of a weight: with larger ones a library's products are faster (896 x 4864 by a twentieth, on two cores)."""


def fuse_decoder_layers(model: nn.Module) -> None:
    """Let every decoder layer built as Llama's compute float32 rows on a CPU in one operation, forwards and backwards.

    That reads and writes less, and sums the adapters' gradients in the same order for any number of threads.
    """
    for module in model.modules():
        if _is_built_as_llamas(module) and (options := _tried(module)) is not None:
            module.forward = _fused(module, module.forward, options)
            module.register_forward_pre_hook(_with_weights(list(module.modules())))


def _is_built_as_llamas(module: nn.Module) -> bool:
    """Whether a module has the parts of a layer that the operation may compute."""
    for name, children in PARTS.items():
        part = getattr(module, name, None) if name else module
        if not isinstance(part, nn.Module) or {child for child, _ in part.named_children()} != children:
            return False
    return all(map(_fits_layer, _layers(module)))


def _layers(module: Any) -> list[Any]:
    """The linear layers, in the order of PROJECTIONS."""
    attention, mlp = module.self_attn, module.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj,
            mlp.down_proj]  # fmt: skip


def _fits_layer(layer: nn.Module) -> bool:
    """Whether a linear layer is torch's own, or has plain adapters on one, and is of a size that is worth it."""
    base = layer.base_layer if is_adapted(layer) else layer
    if type(base) is not nn.Linear:
        return False
    outputs, inputs = base.out_features, base.in_features
    return outputs * inputs <= MOST_NUMBERS and not outputs % MULTIPLE and not inputs % MULTIPLE


class _TrialLayout:
    """Plain causal attention of a few tokens, which remembers how it was asked for it."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self.options = options
        return block_layout([(query.shape[2], [])]).attend(layer, query, key, value, options)


def _tried(module: Any) -> AttentionOptions | None:
    """How a layer's attention weighs keys, if the layer with weights of any size computes what the operation does.

    Each layer is tried: those of a class may differ in what they hold, or by their number.
    """
    eps, second = (getattr(norm, "variance_epsilon", None) for norm in _norms(module))
    if eps is None or eps != second:
        return None
    try:
        # large numbers show what is cut off, as gates of gpt-oss are at 7; a policy of `plan` is built on "meta"
        with torch.device("cpu"):
            (given, truth, options), large = _trial(module, eps, 1.0), _trial(module, eps, 30.0)
    except Exception:  # a layer of any code may ask for what it does not get
        return None
    same = all(isinstance(y, Tensor) and y.shape == exact.shape and torch.allclose(y, exact, 1e-4, 1e-4)
               for y, exact in ((given, truth), large[:2]))  # fmt: skip
    is_plain_softmax = options == AttentionOptions(options.scale, options.window)
    return options if same and is_plain_softmax else None


def _norms(module: Any) -> tuple[nn.Module, nn.Module]:
    return module.input_layernorm, module.post_attention_layernorm


@torch.no_grad()
def _trial(module: Any, eps: float, factor: float) -> tuple[Any, Tensor, AttentionOptions]:
    """The output of a layer with small weights, the operation's, and how its attention was asked to weigh keys. Input,
    values and the input of the feed-forward part are `factor` times as large as numbers usually are."""
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, inner, size, heads = 5, 8, 12, module.self_attn.head_dim, 2

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    x, norm, mlp_norm = factor * numbers(1, tokens, hidden), numbers(hidden), factor * numbers(hidden)
    cos, sin = numbers(2, 1, tokens, size)
    q, k, v, o = numbers(heads * size, hidden), *numbers(2, size, hidden), numbers(hidden, heads * size)
    v, (gate, up, down) = factor * v, (*numbers(2, inner, hidden), numbers(hidden, inner))
    layout = _TrialLayout()
    small = _with(module, {
        "self_attn": _with(module.self_attn, {"q_proj": Product(q), "k_proj": Product(k), "v_proj": Product(v),
                                              "o_proj": Product(o)}),
        "mlp": _with(module.mlp, {"gate_proj": Product(gate), "up_proj": Product(up), "down_proj": Product(down),
                                  "act_fn": module.mlp.act_fn}),
        "input_layernorm": _with(module.input_layernorm, {}, norm),
        "post_attention_layernorm": _with(module.post_attention_layernorm, {}, mlp_norm),
    })  # fmt: skip
    given = small.forward(x, position_embeddings=(cos, sin), layout=layout)

    def heads_of(rows: Tensor, weight: Tensor) -> Tensor:  # (1, heads, tokens, size)
        return (rows @ weight.T).view(1, tokens, -1, size).transpose(1, 2)

    normed = rms_norm(x, norm.shape, norm, eps)
    query, key, value = (heads_of(normed, each) for each in (q, k, v))
    query, key = (turned(each, cos, sin) for each in (query, key))
    attended = layout.attend(0, query, key, value, layout.options)
    middle = x + attended.reshape(1, tokens, -1) @ o.T
    normed = rms_norm(middle, norm.shape, mlp_norm, eps)
    return given, middle + (silu(normed @ gate.T) * (normed @ up.T)) @ down.T, layout.options


def _with(module: nn.Module, children: dict[str, nn.Module], weight: Tensor | None = None) -> Any:
    """A module like this one, with the code of its class, other children and, if it is given, another weight."""
    small = copy.copy(module)
    vars(small).pop("forward", None)
    small._modules = dict(children)
    if weight is not None:
        small._parameters = {"weight": nn.Parameter(weight)}
    return small


def _fused(module: Any, plain: Callable[..., Tensor], options: AttentionOptions) -> Callable[..., Tensor]:
    norms = _norms(module)
    layers = dict(zip(PROJECTIONS, _layers(module), strict=True))
    size, eps = module.self_attn.head_dim, norms[0].variance_epsilon

    def forward(*given: Any, **named: Any) -> Tensor:
        is_known = len(given) == 1 and not is_plain() and _is_known(given[0], size, named)
        weights = _weights(given[0], layers) if is_known else None
        scales = norms[0].weight, norms[1].weight
        if weights is None or not _are_frozen(*scales) or not pack_kernels.fits(given[0], *scales):
            return plain(*given, **named)
        x, cos, sin = (each.flatten(0, -2).contiguous() for each in (given[0], *named["position_embeddings"]))
        how = LayerWeights(size, eps, options.scale_of(cos), options.window, *scales, weights)
        adapters = (matrix for _, both in how.adapted() for matrix in both)
        return _DecoderLayer.apply(x, cos, sin, how, named["layout"].sequences(), *adapters)[None]

    return forward


def _with_weights(parts: list[nn.Module]) -> Callable[..., None]:
    """ZeRO-3 gathers a weight in the call of its own module, and those of the layer's parts are not called."""

    def gather(module: nn.Module, _: Any) -> None:
        # FSDP2 replaces parameters: nothing holds on to those of before
        gather_with(module, (each for part in parts for each in part._parameters.values() if each is not None))

    return gather


def _is_known(x: Tensor, size: int, named: dict[str, Any]) -> bool:
    """Whether the operation knows all arguments of a call of a layer whose heads have this size."""
    said = {name for name, value in named.items() if value is not None and value is not False} - UNUSED
    if said != {"layout", "position_embeddings"} or not isinstance(named["layout"], RowLayout):
        return False
    cos, sin = named["position_embeddings"]
    tokens = named["layout"].tokens
    # of a part of each head, rotations are smaller
    return x.shape[:2] == (1, tokens) and cos.shape == sin.shape == (1, tokens, size) and pack_kernels.fits(cos, sin)


def _weights(x: Tensor, layers: dict[str, Any]) -> dict[str, Projection] | None:
    """What linear layers compute with now, if the operation can."""
    if torch.is_autocast_enabled(x.device.type):
        return None
    found = {}
    for name, layer in layers.items():
        base, scaling, adapters = layer, 0.0, None
        if type(layer) is not nn.Linear:
            if layer.merged or drops(layer):
                return None
            base = layer.base_layer
            if not layer.disable_adapters:
                scaling, adapters = layer.scaling[ADAPTER], (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        frozen = [base.weight] if base.bias is None else [base.weight, base.bias]
        if not _are_frozen(*frozen) or not pack_kernels.fits(*frozen, *(adapters or ()), multiple=1):
            return None
        if not all(is_whole(each) and each.is_contiguous() for each in (*frozen, *(adapters or ()))):
            return None
        found[name] = Projection(base.weight, base.bias, scaling, adapters)
    return found


def _are_frozen(*parameters: Tensor) -> bool:
    return not any(each.requires_grad for each in parameters)


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights, sequences: Sequences, *adapters: Tensor
    ) -> Tensor:
        """`adapters` are those of `weights`."""
        y, kept = decoder_layer(x, cos, sin, weights, sequences)
        ctx.names = list(kept)
        ctx.save_for_backward(*kept.values(), *adapters)
        ctx.how = weights, sequences
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=False))  # behind them are the adapters
        weights, sequences = ctx.how
        of_x = ctx.needs_input_grad[0]
        grad_x, of_adapters = decoder_layer_backward(grad.contiguous(), kept, weights, sequences, of_x)
        return grad_x, None, None, None, None, *of_adapters
