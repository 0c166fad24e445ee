"""Log-probabilities and entropies of chosen tokens. Only one chunk of logits exists at a time. Pure.

The head is linear. The gradient of a token's log-probability by its hidden state is therefore known in the forward
pass: the target's row of the head minus the mean of the rows under the softmax. The gradient of the entropy is known
too: the mean of the rows, weighted by the mean log-probability minus each one. With a frozen head (LoRA), the backward
pass only multiplies these vectors by the incoming gradients. With a trained head it computes the logits again, chunk by
chunk.

Shapes: M tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import pack_kernels
from .products import float32_product, weighted
from .triton_trial import triton_obstacle

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Most logits at once. 64 MiB in float32 on a CPU, half of which fit into its caches. 1 GiB on a GPU, because a chunk
must keep it busy and reads the entire head."""


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"]) // vocabulary)
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (m, V) in float32."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = float32_product(hidden, weight.T)
        return logits if bias is None else logits.add_(bias)
    return weighted(hidden, weight, bias).float()


def _scored(
    logits: Tensor, targets: Tensor, temperature: float, slope_dtype: torch.dtype | None, keeps_logits: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities (m,) of targets, entropies (m,) and, in `slope_dtype`, the derivative (m, V) of the
    log-probabilities by the logits (m, V) float32, perhaps in the place of these. The subtraction is in float32: in 16
    bits it would be 0 for a confident token."""
    if pack_kernels.fits(logits, multiple=1):
        if slope_dtype is None:
            return *pack_kernels.score_rows(logits, targets.contiguous(), temperature, slopes=False), None
        place = logits.clone() if keeps_logits else logits
        scored = pack_kernels.score_rows(place, targets.contiguous(), temperature, slopes=True)
        return *scored, place.to(slope_dtype)
    if logits.is_cuda and triton_obstacle() is None:
        from .head_kernel import score_rows

        return score_rows(logits, targets, temperature, slope_dtype)
    rows = torch.log_softmax(logits / temperature, dim=-1)
    probs = rows.exp()
    entropies = -(probs * rows).sum(-1)
    slopes = None
    if slope_dtype is not None:
        slopes = probs.neg_().scatter_add_(1, targets[:, None], probs.new_ones(len(probs), 1)).div_(temperature)
    return rows.gather(-1, targets[:, None])[:, 0], entropies, slopes if slopes is None else slopes.to(slope_dtype)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        needs_hidden, needs_head = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        direction = torch.empty_like(hidden) if needs_hidden and not needs_head else None
        entropy_direction = torch.empty_like(hidden) if direction is not None and entropy_gradient else None
        for piece in _chunks(hidden, weight.shape[0]):
            logits = _logits(hidden[piece], weight, bias)
            logprobs[piece], entropies[piece], slopes = _scored(
                logits, targets[piece], temperature, None if direction is None else weight.dtype,
                keeps_logits=entropy_gradient,
            )  # fmt: skip
            if direction is not None and slopes is not None:
                torch.mm(slopes, weight, out=direction[piece])
            if entropy_direction is not None:
                slope = _entropy_slope(torch.log_softmax(logits / temperature, dim=-1), entropies[piece])
                entropy_direction[piece] = (slope.to(weight.dtype) @ weight) / temperature
        ctx.temperature, ctx.head_is_frozen, ctx.entropy_gradient = temperature, not needs_head, entropy_gradient
        if direction is not None:
            ctx.save_for_backward(direction, *([] if entropy_direction is None else [entropy_direction]))
        elif needs_head:
            ctx.save_for_backward(hidden, weight, bias, targets)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.head_is_frozen:
            direction, *entropy_direction = ctx.saved_tensors
            grad_hidden = direction * grad_logprobs[:, None].to(direction.dtype)
            for each in entropy_direction:
                grad_hidden += each * grad_entropies[:, None].to(each.dtype)
            return grad_hidden, None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for piece in _chunks(hidden, weight.shape[0]):
            logits = _logits(hidden[piece], weight, bias)
            _, entropies, slope = _scored(logits, targets[piece], ctx.temperature, torch.float32,
                                          keeps_logits=ctx.entropy_gradient)  # fmt: skip
            assert slope is not None
            slope *= grad_logprobs[piece, None]
            if ctx.entropy_gradient:
                of_entropy = _entropy_slope(torch.log_softmax(logits / ctx.temperature, dim=-1), entropies)
                slope += of_entropy * (grad_entropies[piece, None] / ctx.temperature)
            slope_cast = slope.to(weight.dtype)
            grad_hidden[piece] = slope_cast @ weight
            grad_weight += float32_product(slope_cast.T, hidden[piece])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None


def _entropy_slope(rows: Tensor, entropies: Tensor) -> Tensor:
    """Derivative of each row's entropy by its logits: -p (log p + H), with `rows` = log p (m, V) and H (m,)."""
    return -rows.exp() * (rows + entropies[:, None])


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability of each target and entropy of each distribution (nats), both (M,) float32.

    `hidden` (M, H), `weight` (V, H), `bias` (V,) or None, `targets` (M,) int64. Differentiable with respect to hidden
    states, weight and bias through the log-probabilities, and with `entropy_gradient` through the entropies too.
    """
    # a head that trains in float32 under autocast: autograd must see the cast
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return _HeadLogprobs.apply(hidden, weight, bias, targets, temperature, entropy_gradient)


def logits_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """The same from all logits (M, V), for models that change logits after the head."""
    rows = torch.log_softmax(logits.float() / temperature, dim=-1)
    certain = rows if entropy_gradient else rows.detach()
    entropies = -(certain.exp() * certain).sum(-1)
    return rows.gather(-1, targets[:, None])[:, 0], entropies
