"""The architectures that people train, a line each, and the table of them at the top of docs/models.md.

    python docs/architectures.py      # writes the page again; tests/unit/test_architectures.py compares

The test makes a tiny model of each line and fails where the product treats it otherwise than the line says.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Architecture(NamedTuple):
    """What this project does with a model type. The defaults are those of Llama."""

    models: str
    """Models people know that have the type."""
    kind: str
    """The type, as config.json has it in `model_type`."""
    step: str = "compiled"
    """A step of decoding on a CPU, by its name in `rollout.choose.STEPS`; without effect with `rows`."""
    rows: str | None = None
    """Words of the reason why each completion is a row of its own; None where completions share packs."""
    without: tuple[str, ...] = ()
    """Reasons why some linear layers get no adapter."""
    vllm: str | None = "own code"
    """How vLLM computes it; None where it does not."""
    refused: str | None = None
    """Words of the reason why it cannot be trained; None where it can."""


EXPERTS = "experts in one tensor"
OUTSIDE = "outside the language model"
SHARED_EXPERT = "PEFT takes its name for the experts'"
MAMBA = "Mamba's kernels take its weights without calling it"
LINEAR = "layers of the kinds linear_attention"
IMAGES = "expected a causal language model"
THROUGH = "through transformers"

ARCHITECTURES = [
    Architecture("Llama 2 and 3, SmolLM2, Falcon 3, Yi, R1-Distill-Llama", "llama"),
    Architecture("Mistral 7B, Nemo, Small 3", "mistral"),
    Architecture("Qwen2, Qwen2.5, QwQ, R1-Distill-Qwen", "qwen2"),
    Architecture("Qwen3", "qwen3"),
    Architecture("SmolLM3", "smollm3", vllm=THROUGH),
    Architecture("Granite 3", "granite"),
    Architecture("Seed-OSS", "seed_oss", vllm=THROUGH),
    Architecture("Phi-1, Phi-2", "phi", "modules", vllm=THROUGH),
    Architecture("Phi-3, Phi-4", "phi3"),
    Architecture("Gemma", "gemma"),
    Architecture("Gemma 2", "gemma2"),
    Architecture("Gemma 3, 270 M and 1 B", "gemma3_text"),
    Architecture("Gemma 3, from 4 B, as text", "gemma3", without=(OUTSIDE,)),
    Architecture("OLMo", "olmo", "modules", vllm=THROUGH),
    Architecture("OLMo 2", "olmo2", "modules", vllm=THROUGH),
    Architecture("OLMo 3", "olmo3", "modules", vllm=THROUGH),
    Architecture("GLM-4 9B", "glm", "modules", vllm=THROUGH),
    Architecture("GLM-4 0414, GLM-Z1", "glm4", "modules"),
    Architecture("Command R7B, Aya", "cohere2", "modules"),
    Architecture("GPT-2", "gpt2", "modules"),
    Architecture("Pythia", "gpt_neox", "modules", vllm=THROUGH),
    Architecture("StarCoder2", "starcoder2", "modules", vllm=THROUGH),
    Architecture("Mixtral", "mixtral", "operations", without=(EXPERTS,)),
    Architecture("Qwen3-30B-A3B, Qwen3-235B-A22B", "qwen3_moe", "operations", without=(EXPERTS,)),
    Architecture("gpt-oss", "gpt_oss", "operations", without=(EXPERTS,)),
    Architecture("OLMoE", "olmoe", "modules", without=(EXPERTS,)),
    Architecture("GLM-4.5, GLM-4.6", "glm4_moe", "modules", without=(SHARED_EXPERT, EXPERTS)),
    Architecture("DeepSeek-V3, R1", "deepseek_v3", "modules", without=(SHARED_EXPERT, EXPERTS)),
    Architecture("Llama 4, as text", "llama4", rows="layers of the kinds chunked_attention",
                 without=("a layer with code of its own", EXPERTS), vllm=None),
    Architecture("Granite 4", "granitemoehybrid", rows=LINEAR, without=(MAMBA, EXPERTS)),
    Architecture("Falcon-H1", "falcon_h1", rows="layers of the kinds hybrid", without=(MAMBA,)),
    Architecture("Mamba 2", "mamba2", rows=LINEAR, without=(MAMBA,)),
    Architecture("Nemotron-H", "nemotron_h", rows=LINEAR, without=(MAMBA, EXPERTS)),
    Architecture("LFM2", "lfm2", rows="layers of the kinds conv"),
    Architecture("Qwen3-Next", "qwen3_next", rows=LINEAR, without=(SHARED_EXPERT, EXPERTS)),
    Architecture("Qwen3.5, as text", "qwen3_5", rows=LINEAR),
    Architecture("Qwen2.5-VL", "qwen2_5_vl", refused=IMAGES),
    Architecture("Qwen3-VL", "qwen3_vl", refused=IMAGES),
    Architecture("Mistral Small 3.1, Ministral 3", "mistral3", refused=IMAGES),
]  # fmt: skip
"""By kind of attention, and then by age. A further line is a further row of the table and a further test."""

HEAD = """## The architectures people train

A completion that shares a pack with others of its group costs no second prompt. A step of decoding is named as on a
CPU; as on a GPU. `lora.target_modules: all-linear` puts adapters on all linear layers of the language model but its
head, with the exceptions in the table. vLLM 0.32 serves a model by code of its own, or through transformers' code.

Adapters are LoRA or rsLoRA. DoRA is refused: it scales each output by the norm of a row of W + BA, which a step of
decoding would compute again from all weights, or keep in merged weights, where rounding loses small updates. Trained
biases and `modules_to_save` are refused too; `lora: null` trains all weights.

| models | type | a completion | a step of decoding | adapters | vLLM |
|---|---|---|---|---|---|
"""
STEPS = {
    "compiled": "in C++; in fused kernels",
    "operations": "in few operations; in fused kernels, around its experts",
    "modules": "its own modules; the same over pages",
}


def table(architectures: list[Architecture] = ARCHITECTURES) -> str:
    """The section of the page."""
    return HEAD + "\n".join(_row(each) for each in architectures) + "\n"


def reasons(left_out: str | None) -> tuple[str, ...]:
    """The reasons in a note about layers that get no adapter: `NAMES (REASON); NAMES (REASON)`."""
    return tuple(re.findall(r" \(([^()]+)\)(?:;|$)", left_out or ""))


def _row(each: Architecture) -> str:
    if each.refused is not None:
        return f"| {each.models} | `{each.kind}` | refused: {each.refused} | | | |"
    place = "shares a pack" if each.rows is None else f"is a row: {each.rows}"
    step = STEPS[each.step] if each.rows is None else "one group at a time"
    adapters = "all" if not each.without else f"not: {', '.join(each.without)}"
    return f"| {each.models} | `{each.kind}` | {place} | {step} | {adapters} | {each.vllm or 'no'} |"


if __name__ == "__main__":
    import models

    models.write_page()
