"""Small random models of several families, and the logits of steps of decoding with them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from grpo_dist.model import attention
from grpo_dist.model.lora import fuse_adapters
from grpo_dist.rollout.native.cache import DecodeState
from grpo_dist.rollout.native.steps import prefill

PROMPTS = [[5, 9, 40, 7, 7], [3], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]
STEPS = 40
"""Enough for keys that fill several vectors, and for the cache to grow."""


KINDS: dict[str, Any] = {
    "qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "phi3": Phi3Config, "mistral": MistralConfig,
    "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "granite": GraniteConfig,
}  # fmt: skip
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
           "attention_multiplier": 0.1, "rms_norm_eps": 1e-3}  # fmt: skip
GEMMA2 = {"sliding_window": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}


def make_model(kind: str = "qwen2", **sizes: Any) -> nn.Module:
    """A random model whose biases and norms are not the ones it begins with."""
    options: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, **sizes,
    }  # fmt: skip
    torch.manual_seed(1)
    config = KINDS[kind](**options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(model: nn.Module, rank: int, targets: list[str] | str, learned: float) -> nn.Module:
    """The model with adapters, in float32 as they are trained, that have learned something."""
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=1.5 * rank, target_modules=targets))
    fuse_adapters(wrapped)
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
        if ".lora_B" in name:
            parameter.data.add_(learned * torch.randn(parameter.shape))
    return wrapped.get_base_model()


def tokens_of(rows: Tensor) -> Tensor:
    """Tokens (STEPS, R) that rows, which have a number each, are given one after another."""
    return (torch.arange(STEPS)[:, None] * 7 + rows * 13) % 61


@torch.inference_mode()
def decoded(step_of: Any, model: nn.Module, sizes: list[int], shares: bool, rows: Tensor | None = None) -> Tensor:
    """Logits (STEPS, R, V) of completions, `sizes[n]` of them behind PROMPTS[n]; of `rows` alone, if they are given."""
    layout, _ = prefill(model, PROMPTS)
    state = DecodeState(torch.device("cpu"), STEPS, shares=shares, whole_chunks=False)
    state.admit(layout, sizes)
    kept = torch.arange(sum(sizes)) if rows is None else rows
    state.keep(kept)
    step, logits = step_of(model), []
    for tokens in tokens_of(kept):
        state.make_room()
        state.begin_step()
        logits.append(step(tokens, state.prompt_lengths[state.prompt] + state.lengths, state).double())
        state.end_step()
        state.count_step()
    return torch.stack(logits)
