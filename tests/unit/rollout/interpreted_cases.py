"""The cases of `interpreted_kernels.py`, with their models. Triton's interpreter has to be chosen before the import."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers import Gemma2ForCausalLM as Gemma2
from transformers import Gemma3ForCausalLM as Gemma3
from transformers import GptOssForCausalLM as GptOss
from transformers import GraniteForCausalLM as Granite
from transformers import LlamaForCausalLM as Llama
from transformers import Qwen2ForCausalLM as Qwen2
from transformers import Qwen3ForCausalLM as Qwen3
from transformers import Qwen3MoeForCausalLM as Qwen3Moe

from grpo_dist.model import attention
from grpo_dist.model.peft import PeftLoraConfig, with_new_adapters
from grpo_dist.model.routing import Routers
from grpo_dist.rollout.native import gpu
from grpo_dist.rollout.native.fused import FusedStep
from grpo_dist.rollout.native.steps import module_step
from grpo_dist.rollout.sampling import Sampling
from grpo_dist.rollout.stop import stop_strings

Cases = list[tuple[Any, ...]]
RULES = Sampling(
    banned=(3, 9), min_new_tokens=2, stop=stop_strings(["ab", "fgh"], [bytes([97 + n]) for n in range(23)])
)


def cases(is_all: bool) -> tuple[Cases, Cases, Cases]:
    """The arguments of `attention_of_pages`, of `completions` and of `turns`."""
    pages_of: Cases = [(None, 6, 2, 32), (None, 2, 2, 16, 3, None, True), ((1, 1), 2, 1, 16, 130, 0.4, True)]
    qwen2, qwen3 = model_of(Qwen2, Qwen2Config), model_of(Qwen3, Qwen3Config, head_dim=8)
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    gemma2 = model_of(Gemma2, Gemma2Config, head_dim=8, sliding_window=68, attn_logit_softcapping=0.5,
                      final_logit_softcapping=3.0)  # fmt: skip
    granite = model_of(Granite, GraniteConfig, embedding_multiplier=3.0, residual_multiplier=0.22, logits_scaling=2.0)
    experts = model_of(Qwen3Moe, Qwen3MoeConfig, **sizes)
    Routers(experts)
    with_sinks = model_of(
        GptOss, GptOssConfig, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2
    )
    Routers(with_sinks)
    # few rows and tokens: a program takes the interpreter 10 to 40 ms
    rollouts: Cases = [
        (qwen2, FusedStep, 64 * 5, Sampling(0.8), 2),
        (adapted(model_of(Llama, LlamaConfig, attention_bias=True, mlp_bias=True)), FusedStep, 1 << 20,
         Sampling(0.9, top_k=9, min_p=0.02), 1, 4),
        (adapted(gemma2), FusedStep, 1 << 20, Sampling(), 1, 4),
        (model_of(Gemma3, Gemma3TextConfig, head_dim=8, sliding_window=5), FusedStep, 1 << 20, Sampling(), 1, 4),
        (with_sinks, FusedStep, 1 << 20, Sampling(), 1, 4),
    ]  # fmt: skip
    episodes: Cases = [(qwen2, 64 * 4, 2, Sampling(0.8))]
    if is_all:
        episodes += [(qwen2, 1 << 20, 1, RULES), (qwen2, 1 << 20, gpu.ANSWER_TOKENS + 1, Sampling(0.8), (2,), 150),
                     (experts, 1 << 20, 2, Sampling(0.8))]  # fmt: skip
        pages_of += [((1, 2), 4, 4, 16), ((4, 1), 7, 1, 24), ((2, 2), 4, 2, 16, 90), ((2, 4), 2, 2, 16, None, 2.0),
                     ((4, 1), 4, 2, 16, 90, None, True), ((2, 1), 16, 1, 256, 90)]  # fmt: skip
        rollouts += [
            (qwen3, FusedStep, 1 << 20, Sampling(top_p=0.9)),
            (qwen2, module_step, 1 << 20, Sampling()),
            (qwen2, FusedStep, 1 << 20, RULES),
            (experts, module_step, 64 * 5, Sampling()),
            (experts, FusedStep, 64 * 5, Sampling()),
            (gemma2, module_step, 1 << 20, Sampling()),
            (adapted(granite), FusedStep, 1 << 20, Sampling(), 1, 4),
        ]
    return pages_of, rollouts, episodes


def model_of(kind: Any, config: Any, **options: Any) -> Any:
    """A tiny model whose draws are neither uniform nor certain, norms and biases included."""
    torch.manual_seed(3)
    shape = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    model = kind._from_config(config(**shape, **options), attn_implementation=attention.NAME).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def adapted(model: Any) -> Any:
    """The model with adapters of several ranks, not on every layer, that change its outputs."""
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
    options = {"r": 3, "lora_alpha": 6, "rank_pattern": {"q_proj": 5, "up_proj": 19}, "target_modules": targets}
    adapters = with_new_adapters(model, PeftLoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapters.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return adapters.base_model.model
