"""PEFT without bitsandbytes, which it imports wherever that is installed."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import import_utils
from torch import nn

from grpo_dist.model.peft import LoraLinear, PeftLoraConfig, with_new_adapters

bnb = pytest.importorskip("bitsandbytes")


def adapted() -> nn.Module:
    config = PeftLoraConfig(target_modules=["0"])
    return with_new_adapters(nn.Sequential(nn.Linear(4, 4)), config).get_submodule("base_model.model.0")


def test_a_plain_model_does_not_load_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/unit/test_packaging.py` has a run in which PEFT is imported as well."""
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    import_utils.is_bnb_available.cache_clear()
    assert type(adapted()) is LoraLinear
    assert "bitsandbytes" not in sys.modules
    monkeypatch.undo()
    assert import_utils.is_bnb_4bit_available(), "PEFT asks again"


def test_where_it_is_loaded_peft_knows_its_layers() -> None:
    base = nn.Sequential(bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=False))
    base.is_loaded_in_8bit = True
    layer = with_new_adapters(base, PeftLoraConfig(target_modules=["0"])).get_submodule("base_model.model.0")
    assert type(layer).__name__ == "Linear8bitLt" and torch.is_tensor(layer.lora_A["default"].weight)
