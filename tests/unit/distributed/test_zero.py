"""ZeRO's options, before any model is loaded."""

from __future__ import annotations

import importlib
import sys

import pytest

from grpo_dist.distributed.deepspeed import _import_muon, _require_known_options


def test_what_deepspeed_refuses_is_said_before_models_are_loaded() -> None:
    options = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    _require_known_options(options)
    options["zero_optimization"] = {"stage": 2, "overlap_com": True}
    with pytest.raises(ValueError, match=r"(?s)launch config: DeepSpeed refuses its options: .*overlap_com"):
        _require_known_options(options)


def test_deepspeeds_muon_is_imported_without_torchs_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    if not hasattr(compiler, "compile"):
        pytest.skip("this release has no Muon")
    asked: list[str] = []
    monkeypatch.setattr(compiler, "compile", lambda: asked.append)
    for name in [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon")]:
        monkeypatch.delitem(sys.modules, name)
    _import_muon()
    assert sys.modules["deepspeed.runtime.zero.muon.muon_optimizer"].MuonWithAuxAdam and not asked
    compiler.compile()("restored")
    assert asked == ["restored"]
