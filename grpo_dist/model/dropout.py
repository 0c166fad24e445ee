"""Dropout of adapters as a function of counters: what is dropped depends on token and layer, not on rank or pack. Pure.

A token's inputs are dropped by a hash of (seed, step, update, completion or prompt, position, layer, input). The same
inputs are dropped on every rank, in every pack and beside any other completion. A prompt that several packs share is
the same prompt in each of them, and a backward pass that recomputes activations drops what the forward pass dropped.

Shapes: T tokens of the row, I inputs of a layer.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..algorithm.hashing import hashed, short_numbers, stream_key

LEVELS = 1 << 16
"""Shares are rounded to one part in so many."""


class TokenKeys:
    """The keys of the row under way, which all layers of a model draw from."""

    def __init__(self) -> None:
        self.keys = torch.empty(0, dtype=torch.int64)
        """(T,) int64."""

    def draw(self, key: int, owner: Tensor, positions: Tensor) -> None:
        """Set the keys of a row: `owner` (T,) is whose each token is, `positions` (T,) its place there; both int64."""
        self.keys = hashed(hashed(torch.full_like(owner, key), owner), positions)


class TokenDropout(nn.Module):
    """Dropout of one layer's inputs (arXiv:1207.0580) by its tokens' keys."""

    def __init__(self, share: float, layer: str, tokens: TokenKeys) -> None:
        super().__init__()
        self.levels = min(max(round(share * LEVELS), 1), LEVELS - 1)
        self.scale = LEVELS / (LEVELS - self.levels)
        """What the kept inputs are multiplied by, so that the sum over all is the same on average."""
        self.layer, self.key, self.tokens = layer, stream_key("layer", layer), tokens

    def kept(self, x: Tensor) -> Tensor:
        """Which inputs `x` (1, T, …, I) or (T, I) are kept: bool of its shape.

        Raises ValueError where the layer does not compute the row's tokens in their order, as experts do not.
        """
        keys = self.tokens.keys
        if x.shape[: 2 if x.dim() > 2 else 1] not in ((1, len(keys)), (len(keys),)):
            raise ValueError(f"lora.dropout: {1 - 1 / self.scale:.3g} given, but {self.layer} does not compute the "
                             f"tokens of a row in their order (shape {list(x.shape)} for {len(keys)} tokens): what is "
                             "dropped would depend on how the batch is packed. Set lora.dropout to 0, or leave the "
                             "layer out of lora.target_modules")  # fmt: skip
        numbers = short_numbers(hashed(keys, torch.full_like(keys, self.key)), x.numel() // len(keys))
        return (numbers >= self.levels - LEVELS // 2).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the dropped inputs 0 and the kept ones scaled, while training; else `x`."""
        return x * self.kept(x) * self.scale if self.training else x


def drop_by_token(model: nn.Module, share: float, name: str = "default") -> TokenKeys:
    """Let the adapters `name` of a PEFT model drop a `share` of their inputs by the keys that are returned."""
    tokens = TokenKeys()
    for layer_name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_dropout:
            layer.lora_dropout[name] = TokenDropout(share, layer_name, tokens)
    return tokens
