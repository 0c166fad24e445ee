"""The models that are measured: Qwen2 of random weights, made on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention
from grpo_dist.model.load import make_policy

from .device import DEVICE

SHAPES = {
    "0.5b": (896, 24, 14, 2, 4864, 151936),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
    "7b": (3584, 28, 28, 4, 18944, 152064),
    "tiny": (64, 2, 4, 2, 128, 512),
}
"""Hidden, layers, heads, key heads, intermediate and vocabulary of Qwen2 models."""


def model_of(shape: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """A Qwen2 of random weights, on the device."""
    hidden, layers, heads, key_heads, inner, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=shape != "7b",
        **options,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def adapted(shape: str, checkpointing: bool = False) -> Any:
    """A policy with adapters of rank 16 that add something, on the device."""
    policy = make_policy(model_of(shape), ModelConfig(name="none", gradient_checkpointing=checkpointing), LoraConfig())
    policy.fused_head = True
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    return policy.to(DEVICE)
