"""Dropout of adapters as a function of counters. It depends on token and layer, not on rank or pack. Pure.

A hash of (seed, step, update, completion or prompt, position, layer, input) decides whether an input is dropped. The
same inputs are dropped on every rank, in every pack and beside any other completion. All packs that share a prompt drop
the same inputs of it. A backward pass that recomputes activations drops the same inputs as the forward pass.

Shapes: T tokens of the row, I inputs of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..algorithm.hashing import hashed, short_numbers, stream_key
from .peft import ADAPTER, LoraLayer

LEVELS = 1 << 16
"""Shares are rounded to multiples of 1 / LEVELS."""


class TokenKeys:
    """The keys of the current row, which all layers of a model use."""

    def __init__(self) -> None:
        self.keys = torch.empty(0, dtype=torch.int64)
        """(T,) int64."""

    def draw(self, key: int, owner: Tensor, positions: Tensor) -> None:
        """Set the keys of a row by the sequence of each token, `owner` (T,), and its place there, `positions` (T,)."""
        self.keys = hashed(hashed(torch.full_like(owner, key), owner), positions)


class TokenDropout(nn.Module):
    """Dropout of one layer's inputs (arXiv:1207.0580) by the keys of the tokens."""

    def __init__(self, share: float, layer: str, tokens: TokenKeys) -> None:
        super().__init__()
        self.levels = min(max(round(share * LEVELS), 1), LEVELS - 1)
        self.scale = LEVELS / (LEVELS - self.levels)
        """Factor of the kept inputs, which keeps the expected sum."""
        self.layer, self.key, self.tokens = layer, stream_key("layer", layer), tokens

    def kept(self, x: Tensor) -> Tensor:
        """Which of the inputs `x`, (1, T, …, I) or (T, I), are kept: bool of its shape.

        Raises ValueError if the layer does not compute the tokens of a row in order, for example in experts.
        """
        keys = self.tokens.keys
        if x.shape[: 2 if x.dim() > 2 else 1] not in ((1, len(keys)), (len(keys),)):
            raise ValueError(f"lora.dropout: {1 - 1 / self.scale:.3g} given, but {self.layer} does not compute the "
                             f"tokens of a row in order (shape {list(x.shape)} for {len(keys)} tokens): dropout would "
                             "depend on the packing of the batch. Set lora.dropout to 0, or leave the layer out of "
                             "lora.target_modules")  # fmt: skip
        numbers = short_numbers(hashed(keys, torch.full_like(keys, self.key)), x.numel() // len(keys))
        return (numbers >= self.levels - LEVELS // 2).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """In training mode, `x` with dropped inputs set to 0 and kept ones scaled; else `x`."""
        return x * self.kept(x) * self.scale if self.training else x


def drop_by_token(model: nn.Module, share: float) -> TokenKeys:
    """Let the adapters of a PEFT model drop a `share` of their inputs. Returns the keys that decide which."""
    tokens = TokenKeys()
    for layer_name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_dropout:
            layer.lora_dropout[ADAPTER] = TokenDropout(share, layer_name, tokens)
    return tokens
