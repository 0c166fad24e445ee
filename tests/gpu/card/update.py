"""Updates: forward and backward of packs, their time and their memory."""

from __future__ import annotations

from typing import Any

import torch

from grpo_dist.config.rollout import RolloutConfig
from grpo_dist.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from grpo_dist.model import packing
from grpo_dist.planning.predict import Predictor
from grpo_dist.types import Batch, Prompt

from .device import DEVICE, clear, milliseconds, profiled
from .models import SHAPES, adapted


def packs_of(name: str) -> list[tuple[int, list[int]]]:
    """Pieces of the packs that updates are timed on."""
    return {
        "4k: 1 x (256 + 16 x 240)": [(256, [240] * 16)],
        "16k: 4 x (256 + 16 x 240)": [(256, [240] * 16)] * 4,
        "16k: 1 x (256 + 16 x 1000)": [(256, [1000] * 16)],
        "8k: 2 x (256 + 16 x 240)": [(256, [240] * 16)] * 2,
        "tiny": [(9, [5, 6])],
    }[name]


def pack_of(pieces: list[tuple[int, list[int]]], vocabulary: int) -> packing.Pack:
    """A pack of random tokens, with all of `pieces` in its row."""
    lengths = 1 + torch.tensor([length for _, completions in pieces for length in completions])
    group = torch.tensor([n for n, (_, completions) in enumerate(pieces) for _ in completions])
    tokens = torch.randint(3, vocabulary, (int(lengths.sum()),))
    zeros = torch.zeros(len(lengths), dtype=torch.float64)
    prompts = [
        Prompt(n, torch.randint(3, vocabulary, (length,)).tolist(), "", None, {})
        for n, (length, _) in enumerate(pieces)
    ]
    batch = Batch(
        prompts, group, lengths, zeros > 0, tokens, tokens >= 0, torch.zeros(len(tokens)), zeros[:, None], zeros
    )
    place = iter(range(len(lengths)))
    return packing.make_pack(batch, [packing.Piece(n, [next(place) for _ in c]) for n, (_, c) in enumerate(pieces)])


def forward_and_backward(policy: Any, pack: packing.Pack) -> None:
    """A pack's part of an update."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        values, _, _ = policy(pack)
    values.mean().backward()


def update(shape: str, packs: list[str], checkpointing: bool) -> dict[str, Any]:
    """Forward and backward of packs under adapters: time, memory, kernels, share of the matrix units' peak."""
    policy, figures = adapted(shape, checkpointing).train(), {}
    hidden, layers, _, _, _, vocabulary = SHAPES[shape]
    parameters = sum(p.numel() for p in policy.parameters())
    for name in packs:
        pieces = packs_of(name)
        host = pack_of(pieces, vocabulary)
        tokens = len(host.ids)
        pairs = sum(p * p / 2 + sum(c * p + c * c / 2 for c in cs) for p, cs in pieces)
        # forward, and backward to the inputs alone: weights are frozen
        flops = 4 * parameters * tokens + 3.5 * 4 * pairs * hidden * layers
        pack = host.to(DEVICE)

        def both() -> None:
            forward_and_backward(policy, pack)  # noqa: B023

        entry: dict[str, Any] = {"ms": milliseconds(both, 3, 1)}
        if DEVICE.type == "cuda":
            entry["tokens_per_s"] = round(tokens / entry["ms"] * 1e3)
            entry["mfu_of_989"] = round(flops / entry["ms"] * 1e3 / 989e12, 3)
            entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            with profiled(entry, "profile"):
                both()
        figures[name] = entry
        policy.zero_grad(set_to_none=True)
        clear()
    return figures


def memory(shape: str, name: str, checkpointing: bool) -> dict[str, Any]:
    """The peak of a pack's forward and backward, and what `python -m grpo_dist plan` predicts for it."""
    policy, pieces = adapted(shape, checkpointing).train(), packs_of(name)
    pack = pack_of(pieces, SHAPES[shape][5]).to(DEVICE)
    prompt, completions = pieces[0]
    config = Config(
        model=ModelConfig(name="none", gradient_checkpointing=checkpointing), lora=LoraConfig(),
        data=DataConfig(max_prompt_length=prompt),
        rollout=RolloutConfig(group_size=len(completions), max_completion_length=max(completions) + 1),
        train=TrainConfig(batch_size=len(pieces), max_tokens_per_pack=len(pack.ids)),
    )  # fmt: skip
    parts = Predictor(config, policy.causal_lm.config, "gpu").parts(1, "DDP")
    predicted = sum(part.num_bytes for part in parts if part.phase in ("always", "update") and part.name != "optimizer")
    figures: dict[str, Any] = {"predicted_gib": round(predicted / 2**30, 4)}
    for _ in range(2):  # the first compiles kernels
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        policy.zero_grad(set_to_none=True)
        forward_and_backward(policy, pack)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        figures |= {"peak_gib": round(peak / 2**30, 2), "predicted_of_peak": round(predicted / peak, 3)}
    return figures
