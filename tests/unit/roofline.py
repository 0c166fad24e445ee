"""A lower bound of the time of an update's pass on an H100, from what the simulated device counts; as JSON.

    python tests/unit/roofline.py > RESULT.json

One pack of 4 x (256 + 16 x 240) tokens of Qwen2.5-1.5B's shape with adapters of rank 16 on all linear layers, in
bfloat16. The model and the pack are tiny, and each size occurs once (`REAL`), so that every tensor's real size
follows. A kernel takes the larger of its bytes by the card's speed of copying and its operations by the speed of a
large product, and 2 µs. What kernels lose beyond that is not known here: this is no measurement.
"""

from __future__ import annotations

import json
from collections import defaultdict
from math import prod
from typing import Any

import simulated_device
import simulated_packs as packs
import torch
from simulated_device import CUDA, MORE_KERNELS, NO_KERNEL, aten
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention, logprobs
from grpo_dist.model.load import make_policy
from grpo_dist.planning.tracing import example_pack

BYTES_PER_S, FLOPS_PER_S, START_S, PEAK = 2.97e12, 700e12, 2e-6, 989e12
"""An H100's speed of copying and of large products, as measured, a small kernel, and the data sheet's peak."""
REAL = {48: 1536, 16: 256, 56: 8960, 6: 12, 8: 128, 4: 64, 64: 151936, 140: 16384, 128: 15360, 12: 1024, 17: 1920,
        9: 1920, 5: 16, 10: 32, 15: 48, 1: 1, 2: 2}  # fmt: skip
"""Hidden, keys of a token, inner, heads, head size, half of it, vocabulary, tokens of the pack, of completions, of
prompts, of a chunk of the head and of its last one, ranks of one adapter, of two and of three, key heads."""
PIECES = [(256, [240] * 16)] * 4
PAIRS = sum(p * p / 2 + sum(c * p + c * c / 2 for c in cs) for p, cs in PIECES)
PARAMETERS = 1_543_714_304
LAYERS = 28
SPENT: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
PRODUCTS = {aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.addmm_.default, aten.mm.out}
plain = simulated_device._run


def size_of(tensor: Tensor) -> int:
    """Real bytes, those of a broadcast dimension once."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    shape = [1 if stride == 0 else REAL.get(size, size) for size, stride in dims]
    return tensor.itemsize * prod(shape)


def group_of(func: Any, tensors: list[Tensor]) -> tuple[str, float]:
    """What an operation does, and its FLOPs."""
    name = str(func).removeprefix("aten.").removeprefix("simulated.")
    if "_flash" in name:
        # the forward pass is one of two calls; each computes its part of the pairs
        share = 0.5 if "forward" in name else 1.25
        return "attention", share * 4 * PAIRS * 1536
    if func in PRODUCTS:
        x, y = tensors[-2:] if "out" not in name else tensors[:2]
        m, k, n = (REAL.get(size, size) for size in (x.shape[0], x.shape[1], y.shape[1]))
        kind = "head's products" if 151936 in (m, k, n) else "products"
        return "adapters' products" if {16, 32, 48} & {m, k, n} else kind, 2.0 * m * k * n
    return name, 0.0


def run(func: Any, args: Any, kwargs: Any, bare_args: Any, bare_kwargs: Any) -> Any:
    """Count what an operation moves and computes."""
    result = plain(func, args, kwargs, bare_args, bare_kwargs)
    is_view = func is aten._unsafe_view.default or any(
        each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns
    )
    if is_view or func in NO_KERNEL:
        return result
    given = [*simulated_device._tensors(bare_args), *simulated_device._tensors(bare_kwargs.values())]
    made = [getattr(each, "elem", each) for each in simulated_device._tensors([result])]
    group, flops = group_of(func, given)
    if func in (aten.index_select.default, aten.embedding.default):
        given = given[1:] + made
    moved = sum(map(size_of, given)) + sum(map(size_of, made))
    count = 1 + MORE_KERNELS.get(func, 0)
    seconds = max(moved / BYTES_PER_S, flops / FLOPS_PER_S) + count * START_S
    SPENT[group] = [a + b for a, b in zip(SPENT[group], (count, moved, flops, seconds), strict=True)]
    return result


simulated_device._run = run


def of_layers(num_layers: int) -> dict[str, list[float]]:
    """Kernels, bytes, FLOPs and seconds of each group in the forward and backward pass."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=48, intermediate_size=56, num_hidden_layers=num_layers, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.bfloat16)
    policy = make_policy(base, ModelConfig(name="none"), LoraConfig(r=5), 1.0, 0)
    policy.fused_head = True
    policy, pack = policy.to(CUDA).train(), example_pack(packs.SHAPE, share_prompts=True)
    logprobs.CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 17 * 64}

    def update() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            scores, _, _ = policy(pack.to(CUDA))
        scores.mean().backward()

    update()  # kernels are tried; from here on gradients are there to be added to
    SPENT.clear()
    update()
    return {name: list(values) for name, values in SPENT.items()}


def main() -> None:
    """Print milliseconds of each group, the longest first, and the share of the card's peak."""
    some, more = of_layers(1), of_layers(2)
    groups = {}
    for name in more:
        one, two = some.get(name, [0.0] * 4), more[name]
        kernels, moved, flops, seconds = (a + (LAYERS - 1) * (b - a) for a, b in zip(one, two, strict=True))
        groups[name] = {"kernels": round(kernels), "gb": round(moved / 1e9, 1), "tflop": round(flops / 1e12, 1),
                        "ms": round(seconds * 1e3, 2)}  # fmt: skip
    total = sum(each["ms"] for each in groups.values())
    flops = 4 * PARAMETERS * 16384 + 3.5 * 4 * PAIRS * 1536 * LAYERS
    print(json.dumps({"ms": round(total, 1), "mfu_of_989": round(flops / total * 1e3 / PEAK, 3),
                      "kernels": sum(each["kernels"] for each in groups.values()),
                      "groups": dict(sorted(groups.items(), key=lambda each: -each[1]["ms"]))}))  # fmt: skip


if __name__ == "__main__":
    main()
