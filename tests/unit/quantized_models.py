"""Policies on quantised bases, and what bitsandbytes makes of its codes. Tests that import it need that package."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import LORA
from torch import Tensor, nn

from grpo_dist.config.schema import ModelConfig
from grpo_dist.model.load import make_policy, trainable
from grpo_dist.model.policy import Policy

bnb = pytest.importorskip("bitsandbytes")


def moved(base: nn.Module) -> Policy:
    """A policy on this base whose adapters have learned something."""
    policy = make_policy(base, ModelConfig(), LORA).eval()
    torch.manual_seed(1)
    for parameter in trainable(policy).values():
        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return policy


def dequantised(stored: Any) -> Tensor:
    """What bitsandbytes makes of its codes of 4 bits.

    In lines of one block: on a CPU with AVX-512 it takes the scales of other blocks where lines are no whole blocks.
    """
    state = copy.copy(stored.quant_state)
    if stored.quant_state.shape.numel() % state.blocksize == 0:
        state.shape = torch.Size((stored.quant_state.shape.numel() // state.blocksize, state.blocksize))
    return bnb.functional.dequantize_4bit(stored.data, state).view(stored.quant_state.shape)
