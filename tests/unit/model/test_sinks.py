"""Attention sinks in packs: log-probabilities and gradients are those of transformers' own attention, one row for each
completion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_formulas import backward, forward
from small_experts import build
from small_models import batch_of
from torch import Tensor

from grpo_dist.model import attention, shared_prefix
from grpo_dist.model.packing import Piece, make_pack
from grpo_dist.model.policy import Policy
from grpo_dist.types import Prompt, Trajectory

PROMPTS = [Prompt(n, [(5 * k + n) % 57 + 3 for k in range(length)], "") for n, length in enumerate((3, 21))]
DRAWN = [Trajectory(group, n, [(11 * k + 3 * n + group) % 61 + 3 for k in range(length)], [-1.0] * length, True,
                    [True] * length)
         for group, lengths in enumerate(((9, 1, 14), (5, 12))) for n, length in enumerate(lengths)]  # fmt: skip


def model_with_sinks(implementation: str, window: int) -> Any:
    """gpt-oss with sinks of other sizes than its scores."""
    model = build("gpt_oss", implementation, sliding_window=window)
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "bias")):
            torch.manual_seed(len(name))
            parameter.data.normal_(0, 1)
    return model


def computed(implementation: str, window: int, share_prompts: bool) -> list[Tensor]:
    """Log-probabilities of all completions, and the gradients of all weights."""
    policy = Policy(model_with_sinks(implementation, window)).train()
    batch = batch_of(PROMPTS, DRAWN)
    places = {group: [n for n, its in enumerate(batch.group.tolist()) if its == group] for group in range(2)}
    shared = [[Piece(group, members) for group, members in places.items()]]
    alone = [[Piece(group, [n])] for group, members in places.items() for n in members]
    logprobs = torch.full((len(batch.tokens),), torch.nan)
    for pieces in shared if share_prompts else alone:
        pack = make_pack(batch, pieces, share_prompts=share_prompts)
        found = policy(pack)[0]
        (found * torch.cos(pack.token.float())).sum().backward()
        logprobs[pack.token] = found.detach()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert sum(name.endswith("sinks") for name in gradients) == 2
    return [logprobs, *gradients.values()]


@pytest.mark.parametrize("window", [5, 128])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["blocks", "flash formulas"])
def test_packs_are_rows_of_the_models_own_attention(window: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_gpu:
        monkeypatch.setattr(shared_prefix, "_flash", forward)
        monkeypatch.setattr(shared_prefix, "_flash_backward", backward)
        monkeypatch.setattr(attention, "can_use_flash", lambda *_: True)
    packed, own = computed(attention.NAME, window, True), computed("eager", window, False)
    assert len(packed) == len(own)
    assert float((packed[0] - own[0]).abs().max()) < 5e-6
    for ours, theirs in zip(packed[1:], own[1:], strict=True):
        assert float(theirs.norm()) > 0
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-5
