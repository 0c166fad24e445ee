"""Fused modules and functions are called as those that they replace, in every way that models call them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from grpo_dist.model.fused_modules import fuse_gates, fuse_norms, fuse_rotations


class ScaledRMSNorm(nn.Module):
    """A norm whose caller may pass on what it is multiplied by, as those of Mamba take a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return normed if gate is None else normed * gate


class ScaledMLP(nn.Module):
    """A gated layer whose caller may ask for a part of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x)) * scale


@pytest.mark.parametrize(("module", "fuse"), [(ScaledRMSNorm(), fuse_norms), (ScaledMLP(), fuse_gates)])
def test_a_module_takes_what_it_took(module: Any, fuse: Any) -> None:
    plain, x = module.forward, torch.randn(3, 8)
    name = "gate" if isinstance(module, ScaledRMSNorm) else "scale"
    expected = [plain(x), plain(x, 2.0)]
    fuse(nn.ModuleList([module]))
    assert module.forward is not plain, "it was not recognised"
    calls = [module(x), module(x, 2.0), module(x=x), module(x, **{name: 2.0})]
    for got, truth in zip(calls, [*expected, *expected], strict=True):
        torch.testing.assert_close(got, truth)


def test_a_rotation_takes_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen4 rotates queries without keys, and names the other arguments."""

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def apply_rotary_pos_emb(q: Any, k: Any = None, cos: Any = None, sin: Any = None, scale: float = 1.0) -> Any:
        turns = [turned(x, cos, sin) * scale for x in (q, k) if x is not None]
        return tuple(turns) if k is not None else turns[0]

    file = ModuleType("a_models_file")
    file.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, file.__name__, file)
    model = type("Model", (nn.Module,), {"__module__": file.__name__})()
    fuse_rotations(model)
    q, k, cos, sin = (torch.randn(shape) for shape in ((1, 4, 3, 6), (1, 2, 3, 6), (1, 3, 6), (1, 3, 6)))
    fused = file.apply_rotary_pos_emb
    assert fused is not apply_rotary_pos_emb, "it was not recognised"
    torch.testing.assert_close(fused(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin))
    torch.testing.assert_close(fused(q, k, cos, sin, 2.0), apply_rotary_pos_emb(q, k, cos, sin, 2.0))
    torch.testing.assert_close(fused(q=q, k=k, cos=cos, sin=sin), apply_rotary_pos_emb(q, k, cos, sin))
    for got in (fused(q, cos=cos, sin=sin), fused(q, None, cos, sin)):
        torch.testing.assert_close(got, apply_rotary_pos_emb(q, cos=cos, sin=sin))
