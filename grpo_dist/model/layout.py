"""What attention is asked for: which tokens of a row attend to which, and how a layer weighs them.

Shapes: T tokens in the row, Hq query heads, Hk key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Pieces = Sequence[tuple[int, list[int]]]
"""A row: of each prompt in it, its length and those of its completions."""


@dataclass(frozen=True)
class AttentionOptions:
    """How a layer weighs the keys that a query sees."""

    scale: float | None = None
    """Of the products of queries and keys; None for 1/√D."""
    window: int | None = None
    """The newest positions of its sequence that a query sees, its own included; None for all."""
    softcap: float | None = None
    """c, where a score becomes c · tanh(score / c) (arXiv:2408.00118, section 2)."""
    sinks: Tensor | None = None
    """(Hq,) logits that join each query's softmax and have no value (gpt-oss, arXiv:2508.10925, section 2.2)."""

    def scale_of(self, query: Tensor) -> float:
        """The scale for queries (…, D)."""
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def window_in(self, longest: int) -> int | None:
        """The window, or None where it holds all of a sequence of `longest` tokens."""
        return None if self.window is None or self.window >= longest else self.window


class Layout(Protocol):
    """Which tokens attend to which in a row."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Attention of one layer: `query` (1, Hq, T, D), `key` and `value` (1, Hk, T, D) to (1, T, Hq, D)."""
