"""Weights that lie together are the same weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_dist.model.compiled.library import CACHE_LINE
from grpo_dist.model.large_pages import lay_together


def tied_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                        num_attention_heads=2, tie_word_embeddings=True)).bfloat16()  # fmt: skip


def test_weights_are_the_same_and_one_behind_another() -> None:
    model = tied_model()
    model.model.norm.float()
    norm = model.model.norm.weight.data_ptr()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lay_together(model, torch.bfloat16)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.data_ptr() == norm, "of another dtype"
    places = [(each.data_ptr(), each.nbytes) for each in model.parameters() if each.dtype == torch.bfloat16]
    for (place, num_bytes), (following, _) in pairwise(places):
        assert following == place + -(-num_bytes // CACHE_LINE) * CACHE_LINE


def test_weights_that_lie_together_are_saved_as_others_are(tmp_path: Path) -> None:
    model = tied_model()
    model.save_pretrained(tmp_path / "apart")
    lay_together(model, torch.bfloat16)
    model.save_pretrained(tmp_path / "together")
    apart, together = (load_file(tmp_path / each / "model.safetensors") for each in ("apart", "together"))
    assert apart.keys() == together.keys()
    assert all(torch.equal(apart[name], together[name]) for name in apart)


def test_a_model_without_such_weights_stays_as_it_is() -> None:
    model = nn.Linear(3, 2)
    place = model.weight.data_ptr()
    lay_together(model, torch.bfloat16)
    assert model.weight.data_ptr() == place
