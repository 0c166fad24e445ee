"""Batches of random tokens."""

from __future__ import annotations

import torch

from grpo_dist.types import Batch, Prompt


def make_batch(pieces: list[tuple[int, list[int]]], seed: int = 0, share_sampled: float = 1.0) -> Batch:
    """A batch of random tokens from (prompt length, completion lengths); the first of each completion is sampled."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [Prompt(n, torch.randint(90, (length,), generator=generator).tolist(), "")
               for n, (length, _) in enumerate(pieces)]  # fmt: skip
    lengths = torch.tensor([length for _, lengths in pieces for length in lengths], dtype=torch.int64)
    group = torch.tensor([n for n, (_, lengths) in enumerate(pieces) for _ in lengths], dtype=torch.int64)
    tokens = torch.randint(90, (int(lengths.sum()),), generator=generator)
    zeros = torch.zeros(len(lengths), dtype=torch.float64)
    sampled = torch.rand(len(tokens), generator=generator) <= share_sampled
    sampled[(torch.cumsum(lengths, 0) - lengths)[lengths > 0]] = True
    return Batch(prompts, group, lengths, zeros > 0, tokens, sampled, torch.zeros(int(sampled.sum())), zeros[:, None],
                 zeros)  # fmt: skip
