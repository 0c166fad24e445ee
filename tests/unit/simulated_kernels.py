"""Kernels that a GPU has and the CPU does not, for the simulated device: each one operation, so that it counts as one.

`put_triton_in()` puts the package's Triton kernels for updates into the process by their formulas. What Triton itself
computes is tested in its interpreter (`rollout/test_triton.py`).
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as plain_norm


@torch.library.custom_op("simulated::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's kernel: in float32, rounded once."""
    return plain_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@torch.library.custom_op("simulated::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient by `x`."""
    grad, y, weight = grad.float(), x.float(), weight.float() * torch.ones_like(x, dtype=torch.float32)
    factor = (y.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    inner = grad * weight
    return (factor * (inner - y * factor.pow(2) * (inner * y).mean(-1, keepdim=True))).to(x.dtype)


class RmsNorm(torch.autograd.Function):
    """RMSNorm of rows with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`rms_norm`."""
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`rms_norm_backward`."""
        assert not ctx.needs_input_grad[1]
        return rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


@torch.library.custom_op("simulated::score_rows", mutates_args=())
def score_rows(
    logits: Tensor, targets: Tensor, temperature: float, slope_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_kernel.score_rows`, with an empty tensor for None."""
    rows = torch.log_softmax(logits / temperature, -1)
    chosen, entropies = rows.gather(-1, targets[:, None])[:, 0], -(rows.exp() * rows).sum(-1)
    if slope_dtype is None:
        return chosen, entropies, torch.zeros(0)
    slopes = -rows.exp()
    slopes.scatter_add_(1, targets[:, None], torch.ones_like(slopes[:, :1]))
    return chosen, entropies, (slopes / temperature).to(slope_dtype)


@torch.library.custom_op("simulated::join", mutates_args=())
def join(output: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> tuple[Tensor, Tensor]:
    """`join_kernel.join`."""
    other_sums = torch.where(other_sums.isinf(), -torch.inf, other_sums)
    share = torch.sigmoid(other_sums - sums).T[..., None]
    return torch.lerp(output.float(), other.float(), share).to(output.dtype), torch.logaddexp(sums, other_sums)


def inputs_of_gate(gate: Tensor, up: Tensor, adapters: list[Tensor]) -> list[Tensor]:
    """`gate_kernel.inputs`."""
    inputs = [gate.float(), up.float()]
    if adapters:
        low, *b = (each.float() for each in adapters)
        inputs = [x + part @ each.T for x, part, each in zip(inputs, low.chunk(2, 1), b, strict=True)]
    return inputs


@torch.library.custom_op("simulated::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, adapters: list[Tensor]) -> Tensor:
    """`gate_kernel.gated`."""
    x, y = inputs_of_gate(gate, up, adapters)
    return (torch.nn.functional.silu(x) * y).to(gate.dtype)


@torch.library.custom_op("simulated::gated_backward", mutates_args=())
def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, adapters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`gate_kernel.gated_backward`."""
    x, y = inputs_of_gate(gate, up, adapters)
    grad, share = grad.float(), x.sigmoid()
    return (grad * y * share * (1 + x * (1 - share))).to(gate.dtype), (grad * x * share).to(up.dtype)


@torch.library.custom_op("simulated::rotate", mutates_args=())
def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """`rotation_kernel.rotate`."""
    assert all(each.is_contiguous() for each in (query, key, cos, sin))
    half, cos, sin = cos.shape[-1] // 2, cos.float()[:, None], sin.float()[:, None]
    outputs = []
    for x in (query.float(), key.float()):
        y = x * sin if back else x
        turned = torch.cat([-y[..., half:], y[..., :half]], -1)
        outputs.append((x * cos + (-turned if back else turned * sin)).to(query.dtype))
    return outputs[0], outputs[1]


@torch.library.custom_op("simulated::histc", mutates_args=())
def histc(x: Tensor, bins: int) -> Tensor:
    """How often each of the first `bins` integers occurs, of integers, which the CPU's has not."""
    return torch.bincount(x.long(), minlength=bins).to(x.dtype)


def put_triton_in() -> None:
    """Let the package find its Triton kernels for updates."""

    def scored(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        logprobs, entropies, slopes = score_rows(*arguments)
        return logprobs, entropies, None if arguments[3] is None else slopes

    for name, kernels in {
        "head_kernel": {"score_rows": scored}, "join_kernel": {"join": join},
        "gate_kernel": {
            "gated": lambda gate, up, adapters=(): gated(gate, up, list(adapters)),
            "gated_backward": lambda grad, gate, up, adapters=(): gated_backward(grad, gate, up, list(adapters)),
            "Adapters": lambda *each: each,
            "inputs": inputs_of_gate,
        },
        "rotation_kernel": {"rotate": rotate},
    }.items():  # fmt: skip
        module = types.ModuleType(f"grpo_dist.model.{name}")
        vars(module).update(kernels)
        sys.modules[module.__name__] = module
