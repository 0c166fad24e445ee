"""A lower bound of the time of an update's pass on an H100, from what the simulated device counts; as JSON.

    python tests/unit/roofline.py > RESULT.json

One pack of 4 x (256 + 16 x 240) tokens of Qwen2.5-1.5B's shape with adapters of rank 16 on all linear layers, in
bfloat16. `bounds.py` says what is counted, and what is not.
"""

from __future__ import annotations

import json
from typing import Any

import simulated_packs as packs
import torch
from bounds import H100, Bound, Totals, name_of, of_all_layers, sum_of
from simulated_device import CUDA
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention, logprobs
from grpo_dist.model.load import make_policy
from grpo_dist.planning.tracing import example_pack

PEAK = 989e12
"""An H100's, of the data sheet."""
REAL = {48: 1536, 16: 256, 56: 8960, 6: 12, 8: 128, 4: 64, 64: 151936, 140: 16384, 128: 15360, 12: 1024, 17: 1920,
        9: 1920, 5: 16, 10: 32, 15: 48, 1: 1, 2: 2}  # fmt: skip
"""Hidden, keys of a token, inner, heads, head size, half of it, vocabulary, tokens of the pack, of completions, of
prompts, of a chunk of the head and of its last one, ranks of one adapter, of two and of three, key heads."""
PIECES = [(256, [240] * 16)] * 4
PAIRS = sum(p * p / 2 + sum(c * p + c * c / 2 for c in cs) for p, cs in PIECES)
PARAMETERS = 1_543_714_304
LAYERS = 28


def group_of(func: Any, _: list[Tensor]) -> tuple[str, float]:
    """What an operation that is no product does, and its FLOPs."""
    name = name_of(func)
    if "_flash" in name:
        # the forward pass is one of two calls; each computes its part of the pairs
        share = 0.5 if "forward" in name else 1.25
        return "attention", share * 4 * PAIRS * 1536
    return name, 0.0


BOUND = Bound(H100, REAL, group_of, {16, 32, 48}, 151936)


def of_layers(num_layers: int) -> Totals:
    """The forward and backward pass."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=48, intermediate_size=56, num_hidden_layers=num_layers, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.bfloat16)
    policy = make_policy(base, ModelConfig(name="none"), LoraConfig(r=5))
    policy.fused_head = True
    policy, pack = policy.to(CUDA).train(), example_pack(packs.SHAPE, share_prompts=True)
    logprobs.CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 17 * 64}

    def update() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            scores, _, _ = policy(pack.to(CUDA))
        scores.mean().backward()

    update()  # kernels are tried; from here on gradients are there to be added to
    BOUND.spent.clear()
    update()
    return {name: list(values) for name, values in BOUND.spent.items()}


def main() -> None:
    """Print milliseconds of each group, the longest first, and the share of the card's peak."""
    BOUND.install()
    groups = of_all_layers(of_layers(1), of_layers(2), LAYERS)
    total = sum_of(groups.values(), "ms")
    flops = 4 * PARAMETERS * 16384 + 3.5 * 4 * PAIRS * 1536 * LAYERS
    print(json.dumps({"ms": round(total, 1), "mfu_of_989": round(flops / total * 1e3 / PEAK, 3),
                      "kernels": sum_of(groups.values(), "kernels"), "groups": groups}))  # fmt: skip


if __name__ == "__main__":
    main()
