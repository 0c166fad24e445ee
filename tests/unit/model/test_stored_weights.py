"""Weights are told apart by a few bytes of each tensor, however they are divided into files."""

from __future__ import annotations

from pathlib import Path

import torch
from small_models import make_base
from transformers import AutoModelForCausalLM

from grpo_dist.model.stored_weights import weights_fingerprint


def test_other_values_and_no_other_files_make_other_weights(tmp_path: Path) -> None:
    make_base(tmp_path / "one", tied=False)
    first = weights_fingerprint(tmp_path / "one")
    assert first is not None and weights_fingerprint(tmp_path) is None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert weights_fingerprint(tmp_path / "parts") == first
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.mul_(2.0)
        model.save_pretrained(tmp_path / "other")
        assert weights_fingerprint(tmp_path / "other") != first, name
        with torch.no_grad():
            weight.mul_(0.5)
    model.save_pretrained(tmp_path / "other")
    assert weights_fingerprint(tmp_path / "other") == first
