"""Tiny models of many architectures."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from grpo_dist.model import attention

LONGEST = 64
TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "rotary_dim": 4}
UNPACKABLE: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 4},
    "Mamba2": {"head_dim": 16, "num_heads": 4, "state_size": 4, "n_groups": 1},
    "Bamba": {"attn_layer_indices": [1], **MAMBA},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, **MAMBA, **EXPERTS},
    "FalconH1": {"mamba_d_ssm": 64, **MAMBA},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 200},
    "Llama4Text": {"head_dim": 8, "intermediate_size_mlp": 32, **EXPERTS},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "GPTJ": GPT,
    "Falcon": {"alibi": True},
}  # fmt: skip


def make_config(name: str, options: dict[str, Any]) -> PretrainedConfig:
    """A tiny config of an architecture."""
    return getattr(transformers, f"{name}Config")(**{**TINY, **options})


def make_model(config: PretrainedConfig, implementation: str | None) -> nn.Module:
    """A random model with weights large enough for every token to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def sharp(name: str, config: dict[str, Any], factor: int) -> Any:
    """A model in bfloat16 of many layers, as sure of its tokens as one that was trained."""
    config = config | {"num_hidden_layers": 24, "hidden_size": 64}
    model = make_model(make_config(name, config), attention.NAME).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.ndim == 2 else 1)
    return model


def alone(thing: Any) -> list[Any]:
    """What all ranks say, where there is one."""
    return [thing]
