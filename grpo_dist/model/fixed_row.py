"""A fixed row of tokens and what a model computes for it: a fingerprint of its weights."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import attention
from .attention import RowLayout

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

TOKENS = 64


def most_positions(config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence a model can take, as far as its config tells."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def fixed_ids(model: nn.Module, most: int) -> list[int]:
    """Ids of at most `most` random tokens, the same for every model of a vocabulary."""
    length = min(most, most_positions(model.config))
    count = model.get_input_embeddings().num_embeddings
    return torch.randint(count, (length,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def fixed_logits(model: nn.Module, most: int = TOKENS) -> Tensor:
    """Logits (T, V) float32, on the CPU, after each token of `fixed_ids`."""
    ids = torch.tensor([fixed_ids(model, most)], device=model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids, "use_cache": False}
    if getattr(model.config, "_attn_implementation", None) == attention.NAME:
        positions, layout = torch.arange(ids.shape[1], device=ids.device), RowLayout([(ids.shape[1], [])])
        inputs |= {"position_ids": positions[None], "layout": layout.to(ids.device)}
    return model.eval()(**inputs).logits[0].float().cpu()
