"""A lower bound of the time of a step of decoding on an H100 and an H200, from what the simulated device counts; JSON.

    python tests/unit/decoding_roofline.py > RESULT.json

Rows of 32 prompts of 256 tokens, of Qwen2.5-1.5B's shape with adapters of rank 16 on all linear layers, in bfloat16,
behind so many own tokens (the mean of 1,024 steps is a step behind 512). `bounds.py` says what is counted, and what is
not. Attention reads the keys and values of own tokens, and those of a prompt once for 8 of its rows.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import simulated_decoding as decoding
import torch
from bounds import H100, Bound, Card, Totals, name_of, of_all_layers, sum_of
from simulated_device import CUDA
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention
from grpo_dist.model.load import make_policy
from grpo_dist.rollout.native import gpu
from grpo_dist.rollout.native.engine import NativeDecoder
from grpo_dist.rollout.native.fused import FusedStep
from grpo_dist.rollout.sampling import Sampling

CARDS = {"H100": H100, "H200": Card(4.26e12, H100.flops_per_s, H100.start_s)}
"""An H200's speed of copying is the H100's times the ratio of the data sheets."""
REAL = {60: 1536, 20: 256, 56: 8960, 6: 12, 10: 128, 72: 151936, 124: 2096, 16: 32, 8: 16, 5: 64}
"""Hidden, keys of a token, inner, heads, head size, vocabulary, queries, keys and values with their adapters' first
products, ranks of two adapters and of one, half a head."""
CASES = [(512, 0), (512, 512), (512, 1023), (256, 512), (64, 512)]
"""Rows, and own tokens of each."""
PROMPTS, PROMPT, LAYERS, PARAMETERS = 32, 256, 28, 1_543_714_304
TOKEN_BYTES = 2 * 2 * 128 * 2
"""Keys and values of a token in a layer."""


class Launches:
    """Counts the launches of Triton's kernels: every tensor once, and of the pages what is used of them."""

    def __init__(self, bound: Bound) -> None:
        self.bound, self.pages = bound, dict[str, int]()
        plain = decoding.Kernel.__call__

        def launch(kernel: Any, *args: Any, num_warps: int = 4, **kwargs: Any) -> None:
            plain(kernel, *args, num_warps=num_warps, **kwargs)
            given = dict(zip(kernel.arguments, args, strict=False)) | kwargs
            bound.add(kernel.name, self.moved(kernel.name, given))

        decoding.Kernel.__call__ = launch  # type: ignore[method-assign]

    def moved(self, name: str, given: dict[str, Any]) -> float:
        """Bytes of a launch."""
        hidden = {"keys", "values"} if name in self.pages else set()
        tensors = {id(x): x for key, x in given.items() if isinstance(x, Tensor) and key not in hidden}
        return sum(map(self.bound.size_of, tensors.values())) + self.pages.get(name, 0) * TOKEN_BYTES


def made(num_layers: int, rows: int) -> Any:
    """A rollout under way."""
    config = Qwen2Config(
        vocab_size=72, pad_token_id=0, hidden_size=60, intermediate_size=56, num_hidden_layers=num_layers,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.bfloat16)
    policy = make_policy(base, ModelConfig(name="none"), LoraConfig(r=8))
    engine = NativeDecoder([2], 1024, 1 << 20, step_of=FusedStep, captures=False)
    requests = decoding.requests_of(PROMPTS, rows // PROMPTS, PROMPT)
    work = gpu.DecodingOverPages(engine, policy.causal_lm.to(CUDA).eval(), deque(requests), Sampling())
    work._take()
    work._admit()
    work._lay_tables()
    return work


def of_step(launches: Launches, work: Any, length: int) -> Totals:
    """A step behind `length` own tokens."""
    launches.pages = {"attend_prompts": work.tiles * PROMPT, "attend_own": work.computed * (length + 1),
                      "rotate_and_store": work.computed}  # fmt: skip
    launches.bound.spent.clear()
    work.advance(work.computed, work.tiles)
    return {name: list(values) for name, values in launches.bound.spent.items()}


def main() -> None:
    """Print milliseconds of a step and its groups, and its speed beside that of copying: for what it has to read, which
    is weights once, and keys and values of each prompt and each row once."""
    bound = Bound(H100, REAL, lambda func, _: (name_of(func), 0.0), {16, 32}, 151936)
    bound.install()
    launches, result = Launches(bound), {}
    with torch.inference_mode():
        works = {rows: (made(1, rows), made(2, rows)) for rows, _ in CASES}
        for rows, length in CASES:
            for name, bound.card in CARDS.items():
                groups = of_all_layers(*(of_step(launches, work, length) for work in works[rows]), LAYERS)
                ms = sum_of(groups.values(), "ms")
                needed = 2 * PARAMETERS + LAYERS * TOKEN_BYTES * (PROMPTS * PROMPT + rows * (length + 1))
                result[f"{name}: {rows} rows, {length} own tokens"] = {
                    "ms": round(ms, 2), "tokens_per_s": round(rows / ms * 1e3), "needed_gb": round(needed / 1e9, 2),
                    "of_copying": round(needed / ms * 1e3 / bound.card.bytes_per_s, 3),
                    "kernels": sum_of(groups.values(), "kernels"), "groups": groups,
                }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
