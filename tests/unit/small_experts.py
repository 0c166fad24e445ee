"""Tiny random mixtures of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_models import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip


def build(kind: str, implementation: str, seed: int = 0, **options: Any) -> Any:
    """A model of a type of transformers."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def make_experts(path: Path, kind: str, **options: Any) -> str:
    """A model on the disk, with a tokenizer of one token a byte; returns its place."""
    build(kind, "sdpa" if kind != "gpt_oss" else "eager", **options).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)
