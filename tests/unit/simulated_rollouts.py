"""Random rollouts of tiny models on the CPU, then on the simulated device; the second ones' faults and counts as JSON.

python tests/unit/simulated_rollouts.py FIRST_SEED NUM_CASES > RESULT.json
"""

from __future__ import annotations

import copy
import json
import random
import sys
from typing import Any

import torch
from simulated_cuda import install
from simulated_device import CUDA, SEEN

ENDS = [2, 3, 17]
"""Half of the cases have them eight times: many numbers may be looked for in another way on a GPU."""
VOCABULARY = 61


def make_model(kind: str, seed: int, implementation: str) -> torch.nn.Module:
    """A random model whose draws are neither uniform nor certain."""
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
             "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**shape, **({"head_dim": 16} if kind == "Qwen3" else {}))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "embed" in name or "head" in name else 0.2)
    return model


def make_case(seed: int) -> dict[str, Any]:
    """What to draw, and how."""
    from grpo_dist.algorithm.hashing import stream_key
    from grpo_dist.rollout import Request, Sampling
    from grpo_dist.rollout.native.llama import LlamaStep
    from grpo_dist.rollout.native.steps import module_step
    from grpo_dist.rollout.stop import stop_strings

    rng = random.Random(seed)
    prompts = [[rng.randrange(4, VOCABULARY) for _ in range(rng.randint(1, 20))] for _ in range(rng.randint(1, 5))]
    groups = [rng.randint(1, 4) for _ in prompts]
    requests = [Request(group, sample, prompts[group], stream_key(seed, "train/0", group, sample))
                for group, size in enumerate(groups) for sample in range(size)]  # fmt: skip
    stop = stop_strings(["ab", "ca", "ggg"], [bytes([97 + number % 8]) for number in range(VOCABULARY)])
    sampling = rng.choice([
        Sampling(), Sampling(0.8, top_p=0.9), Sampling(top_k=5), Sampling(0.9, min_p=0.05), Sampling(greedy=True),
        Sampling(0.9, top_p=0.95, top_k=30, min_p=0.001), Sampling(banned=(5, 6), min_new_tokens=3, stop=stop),
        Sampling(top_p=0.95, stop=stop),
    ])  # fmt: skip
    options = {"step_of": rng.choice([module_step, LlamaStep]), "copied_prompt": rng.choice([0, 64])}
    most = rng.choice([5, 12, 40])
    sizes = (most, rng.choice([1, 150, 100_000]) if most < 40 else 100_000)
    return {"kind": ["Llama", "Qwen2", "Qwen3"][seed % 3], "requests": requests, "sampling": sampling,
            "options": options, "sizes": sizes, "ends": ENDS * (1 + seed % 2 * 7)}  # fmt: skip


def drawn(case: dict[str, Any], model: torch.nn.Module, captures: bool) -> list[Any]:
    """The completions of a case."""
    from grpo_dist.rollout import NativeDecoder, decode_all

    engine = NativeDecoder(case["ends"], *case["sizes"], **case["options"], captures=captures)
    return decode_all(engine, model, case["requests"], case["sampling"])


def difference(some: list[Any], others: list[Any]) -> str | None:
    """The first completion that differs, None where none does."""
    for one, other in zip(some, others, strict=True):
        off = max((abs(p - q) for p, q in zip(one.logprobs, other.logprobs, strict=False)), default=0.0)
        if (one.group, one.sample, one.ids, one.finished) != (other.group, other.sample, other.ids, other.finished):
            return f"{one.ids} drawn, {other.ids} expected"
        if off > 1e-4:
            return f"log-probabilities are off by {off:.2g}"
    return None


def run(first: int, count: int) -> dict[str, Any]:
    """All cases."""
    from grpo_dist.model import attention

    cases = [make_case(seed) for seed in range(first, first + count)]
    models = [make_model(case["kind"], seed, attention.NAME) for seed, case in enumerate(cases)]
    expected = [drawn(case, model, False) for case, model in zip(cases, models, strict=True)]
    install()
    faults = {}
    for number, (case, model) in enumerate(zip(cases, models, strict=True)):
        on_device = copy.deepcopy(model).to(CUDA)
        fault = difference(drawn(case, on_device, captures=True), expected[number])
        if fault:
            faults[first + number] = fault
    return {"faults": faults, "completions": sum(map(len, expected)), "seen": SEEN.report()}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
