"""A policy, and the engine that asks servers with vLLM's interface for what it would draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_vllm import FakeVllm
from small_models import make_policy, make_tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.config.schema import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig, RolloutConfig, TrainConfig
from grpo_dist.config.vllm import VllmConfig
from grpo_dist.distributed.ranks import Ranks
from grpo_dist.model.attention import NAME
from grpo_dist.model.load import trainable
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.model.routing import Routers
from grpo_dist.rollout import Request, Sampling, sample
from grpo_dist.rollout.vllm.policy import ServedRun
from grpo_dist.rollout.vllm.start import make_vllm_engine

ENDS = [256, 7, 9]
LORA = LoraConfig(r=3, alpha=6.0)
PROMPTS = [[5, 9, 33], [60, 7, 12, 80], [41, 41]]
REQUESTS = [
    Request(group, number, PROMPTS[group], key=100 * group + number) for group in range(3) for number in range(2)
]


def small_model(path: Path, seed: int) -> ModelConfig:
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=256,
                         bos_token_id=None, initializer_range=0.2)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return ModelConfig(name=str(path), dtype="float32")


class Training:
    """A policy, and the engine that asks some servers for what it would draw."""

    def __init__(self, base: ModelConfig, directory: Path, *servers: FakeVllm, lora: LoraConfig | None = LORA,
                 timeout_seconds: float = 60.0, python: str | None = None, devices: str | None = None,
                 replays: bool = False, **rollout: Any) -> None:  # fmt: skip
        self.config = Config(
            model=base, lora=lora, data=DataConfig(max_prompt_length=64), train=TrainConfig(output_dir=str(directory)),
            rollout=RolloutConfig(
                max_completion_length=6, engine="vllm",
                vllm=VllmConfig(urls=[server.url for server in servers] or None, python=python, devices=devices,
                                retries=2, timeout_seconds=timeout_seconds), **rollout,
            ),
        )  # fmt: skip
        self.policy = make_policy(base, lora)
        weights = RolloutModel(self.policy, torch.float32, NAME)
        self.routers = Routers(self.policy.causal_lm) if replays else None
        ranks = Ranks(torch.float32, OptimConfig())
        self.engine = make_vllm_engine(ServedRun(self.config, ranks, weights, self.policy, ENDS, self.routers))

    def learn(self, scale: float = 0.05) -> None:
        """An update of the policy."""
        with torch.no_grad():
            for parameter in trainable(self.policy).values():
                parameter.add_(torch.randn(parameter.shape) * scale)

    def draw(self, requests: list[Request] = REQUESTS) -> list[list[int]]:
        sampling = Sampling(self.config.rollout.temperature)
        return [each.ids for each in sample(self.engine, requests, sampling)]


Start = Callable[..., Training]
