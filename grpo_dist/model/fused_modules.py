"""Modules of transformers' models as one kernel each: in 16 bits on a GPU, and in float32 on a CPU (`pack.cpp`; linear
layers there by the faster library).

A module of transformers is recognised by what it computes, in a trial on a few numbers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import silu

from ..distributed.sharding import is_sharded
from . import pack_kernels
from .lora import HALVES
from .products import by_onednn, weighted
from .triton_trial import triton_obstacle

_IS_PLAIN = ContextVar("plain", default=False)
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""The modules of a gated feed-forward layer."""


def fuse_norms(model: nn.Module) -> None:
    """Let every plain RMSNorm (arXiv:1910.07467, equation 4) of 16-bit rows on a GPU be torch's own, and of float32
    rows on a CPU, with a frozen weight, that of `pack.cpp`.

    In 16 bits it rounds its result once. transformers' code rounds before the weight as well. Norms of other kinds
    (Gemma's adds 1 to the weight) and of float32 weights on a GPU keep their code.
    """
    known: dict[Hashable, bool] = {}
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", None)
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
            continue
        if _once(known, (type(module), eps), _is_plain_norm, module, eps):
            module.forward = _fused_norm(module, module.forward, eps)


def fuse_gates(model: nn.Module) -> None:
    """Let every SwiGLU layer (arXiv:2002.05202, equation 6) of 16-bit rows on a GPU, or of float32 rows on a CPU,
    compute its gate in one kernel. It rounds its result once, and keeps no output of the activation for the backward
    pass.
    """
    known: dict[Hashable, bool] = {}
    for module in model.modules():
        is_gated = {name for name, _ in module.named_children()} == GATED
        if is_gated and _once(known, (type(module), type(module.act_fn)), _is_plain_gate, module):
            module.forward = _fused_gate(module, module.forward)


def fuse_rotations(model: nn.Module) -> None:
    """Let the functions of transformers' files that rotate queries and keys (arXiv:2104.09864, equation 34) be one
    kernel for 16 bits on a GPU and for float32 on a CPU. It rounds its results once. The functions are those of the
    process, not of the model alone."""
    known: dict[Hashable, bool] = {}
    for module in model.modules():
        namespace = sys.modules[type(module).__module__]
        rotation = vars(namespace).get("apply_rotary_pos_emb")
        if rotation is None or hasattr(rotation, "plain"):
            continue
        if _once(known, namespace.__name__, _is_plain_rotation, rotation):
            namespace.apply_rotary_pos_emb = _fused_rotation(rotation)  # type: ignore[attr-defined]


def fuse_linears(model: nn.Module) -> None:
    """Let torch's own linear layers multiply float32 rows on a CPU by oneDNN, where that is faster (`products.py`)."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = _fused_linear(module, module.forward)  # type: ignore[method-assign]


@contextmanager
def plain_modules() -> Iterator[None]:
    """Inside, models compute as their own code does, and round where it rounds."""
    token = _IS_PLAIN.set(True)
    try:
        yield
    finally:
        _IS_PLAIN.reset(token)


def is_plain() -> bool:
    """Whether `plain_modules` is in force."""
    return _IS_PLAIN.get()


def _once(known: dict[Hashable, bool], kind: Hashable, trial: Callable[..., bool], *arguments: Any) -> bool:
    """The result of a trial for each kind of module."""
    if kind not in known:
        try:
            known[kind] = trial(*arguments)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            known[kind] = False
    return known[kind]


@torch.no_grad()
def _is_plain_norm(module: nn.Module, eps: float) -> bool:
    """Whether a module with a weight of any size computes RMSNorm with that weight alone."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, device="cpu") for shape in ((3, 8), (8,)))
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    given = functional_call(module, {"weight": weight}, (x,))
    return torch.allclose(given, nn.functional.rms_norm(x, (8,), weight, eps), atol=1e-5)


@torch.no_grad()
def _is_plain_gate(module: nn.Module) -> bool:
    """Whether a module computes SwiGLU with its three projections, whatever these are."""
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = (torch.randn(shape, generator=generator, device="cpu")
                         for shape in ((3, 8), (6, 8), (6, 8), (8, 6)))  # fmt: skip
    small = copy.copy(module)
    small._modules = {"act_fn": module.act_fn} | {
        name: Product(weight) for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
    }
    return torch.allclose(type(module).forward(small, x), (silu(x @ gate.T) * (x @ up.T)) @ down.T, atol=1e-4)


@torch.no_grad()
def _is_plain_rotation(rotation: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether a function turns each half of a head against the other, with a cosine and a sine for each number."""
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (torch.randn(shape, generator=generator, device="cpu")
                            for shape in ((1, 4, 3, 6), (1, 2, 3, 6), (1, 3, 6), (1, 3, 6)))  # fmt: skip
    truths = (turned(x, cos, sin) for x in (query, key))
    return all(torch.allclose(got, truth, atol=1e-5)
               for got, truth in zip(rotation(query, key, cos, sin), truths, strict=True))  # fmt: skip


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What a rotation makes of `x` (…, D), in a trial."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Product(nn.Module):
    """A linear layer in a trial."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.matrix = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


def _instead(
    plain: Callable[..., Any], num_given: int, fits: Callable[..., bool], fused: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that is called as `plain` is: `fused` for so many arguments without names that fit, else `plain`."""

    @wraps(plain)
    def call(*given: Any, **options: Any) -> Any:
        is_fused = not is_plain() and not options and len(given) == num_given and fits(*given)
        return fused(*given) if is_fused else plain(*given, **options)

    return call


def _fused_norm(module: nn.Module, plain: Callable[..., Tensor], eps: float) -> Callable[..., Tensor]:
    def fits(x: Tensor) -> bool:
        if x.is_cuda:
            return x.dtype in HALVES and x.dtype == module.weight.dtype
        return not module.weight.requires_grad and pack_kernels.fits(x, module.weight)

    def norm(x: Tensor) -> Tensor:
        if not x.is_cuda:
            return _Norm.apply(x, module.weight, eps)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.rms_norm(x, module.weight.shape, module.weight, eps)

    return _instead(plain, 1, fits, norm)


def _fused_gate(module: nn.Module, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fits(x: Tensor) -> bool:
        return triton_obstacle() is None if x.is_cuda else pack_kernels.fits(x)

    def feed_forward(x: Tensor) -> Tensor:
        family = getattr(module.gate_proj, "family", None)
        if family is not None and (y := family.gated(x)) is not None:
            return module.down_proj(y)
        gate, up = module.gate_proj(x), module.up_proj(x)
        is_half = gate.dtype == up.dtype and gate.dtype in HALVES
        is_fused = is_half if x.is_cuda else pack_kernels.fits(gate, up)
        return module.down_proj(_Gate.apply(gate, up) if is_fused else module.act_fn(gate) * up)

    return _instead(plain, 1, fits, feed_forward)


def _fused_rotation(plain: Callable[..., Any]) -> Callable[..., Any]:
    def fits(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> bool:
        if key is None or len(query) != 1 or len(key) != 1:
            return False
        if not cos.shape == sin.shape == (1, *query.shape[-2:]):
            return False
        if not query.is_cuda:
            return pack_kernels.fits(query, key, cos, sin)
        return (
            triton_obstacle() is None and query.dtype in HALVES and len({x.dtype for x in (query, key, cos, sin)}) == 1
        )

    rotation = _instead(plain, 4, fits, _Rotation.apply)
    rotation.plain = plain  # type: ignore[attr-defined]
    return rotation


def _fused_linear(module: nn.Linear, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fits(x: Tensor) -> bool:
        weight = module.weight
        is_plain = x.dtype == weight.dtype and not is_sharded(weight) and not torch.is_autocast_enabled(x.device.type)
        return is_plain and by_onednn(x, weight.numel())

    return _instead(plain, 1, fits, lambda x: _Linear.apply(x, module.weight, module.bias))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows, weight)
        return weighted(rows, weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weight), shape = ctx.saved_tensors, grad.shape[:-1]
        grad = grad.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # a sum over rows with so many numbers is no faster by oneDNN
        return (weighted(grad, weight.T).unflatten(0, shape) if of_x else None, grad.T @ rows if of_weight else None,
                grad.sum(0) if of_bias else None)  # fmt: skip


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.flatten(0, -2).contiguous()
        y, factors = pack_kernels.normed(rows, weight, eps)
        ctx.save_for_backward(rows, weight, factors)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x = pack_kernels.normed_backward(grad.flatten(0, -2).contiguous(), *ctx.saved_tensors)
        return of_x.view(grad.shape), None, None


class _Rotation(torch.autograd.Function):
    """Heads (1, H, T, D), which lie in memory as a projection has made them: token by token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return _heads(*_rotate(_rows(query), _rows(key), cos[0].contiguous(), sin[0].contiguous()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = (each[0].contiguous() for each in ctx.saved_tensors)
        return *_heads(*_rotate(_rows(of_query), _rows(of_key), cos, sin, back=True)), None, None


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    if query.is_cuda:
        from .rotation_kernel import rotate

        return rotate(query, key, cos, sin, back)
    return pack_kernels.rotate(query, key, cos, sin, back)


def _rows(heads: Tensor) -> Tensor:
    return heads[0].transpose(0, 1).contiguous()


def _heads(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.transpose(0, 1)[None] for each in rows)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        shape, gate, up = gate.shape, *(x.flatten(0, -2).contiguous() for x in (gate, up))
        ctx.save_for_backward(gate, up)
        return _gate_kernels(gate).gated(gate, up).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        kernels = _gate_kernels(grad)
        grads = kernels.gated_backward(grad.flatten(0, -2).contiguous(), *ctx.saved_tensors)
        return grads[0].view(grad.shape), grads[1].view(grad.shape)


def _gate_kernels(x: Tensor) -> Any:
    if x.is_cuda:
        from . import gate_kernel

        return gate_kernel
    return pack_kernels
