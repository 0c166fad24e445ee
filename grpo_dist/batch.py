"""The data that flows through one step: prompts, completions and the global batch.

Pure data: no model, no device handling, no I/O. Shapes use P prompts, N completions, R rewards and T completion tokens
in all; completion n belongs to prompt `group[n]`, and its tokens are the slice `starts[n] : starts[n] + lengths[n]` of
every flat (T,) tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready for the model."""

    index: int
    """Row in the data set."""
    ids: list[int]
    """Token ids of the rendered prompt."""
    text: str
    """The rendered prompt, chat template included."""
    messages: list[dict[str, str]] | None = None
    """The conversation the prompt was rendered from; None for plain text."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, as the rewards receive them."""


@dataclass(frozen=True)
class Completion:
    """What the engine sampled for one (prompt, sample) of a step."""

    slot: int
    """The prompt's place in the step's batch."""
    sample: int
    """The completion's place in its group."""
    ids: list[int]
    """Sampled token ids, the end-of-sequence token included where it was reached."""
    logprobs: list[float]
    """The engine's log-probability of each sampled token (nats)."""
    finished: bool
    """Whether the completion ended by itself; False where the length limit cut it."""


@dataclass(frozen=True)
class Batch:
    """The global batch of one step, the same on every rank."""

    prompts: list[Prompt]
    """The step's P prompts."""
    group: Tensor
    """(N,) int64: the prompt each completion answers."""
    lengths: Tensor
    """(N,) int64: tokens of each completion."""
    finished: Tensor
    """(N,) bool: ended by itself."""
    tokens: Tensor
    """(T,) int64: all completions' token ids, one after another."""
    sampled_logprobs: Tensor
    """(T,) float32: the engine's log-probability of each token (nats)."""
    rewards: Tensor
    """(N, R) float64: one column per reward function; NaN where it does not apply or failed."""
    reward: Tensor
    """(N,) float64: their weighted sum; NaN for a completion that could not be scored."""
    scoring: dict[str, float] = field(default_factory=dict)
    """Metrics of the scoring itself over all ranks: failures, seconds, and what rewards logged."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that rewards logged for the completions' table, N values each, by `REWARD/COLUMN`."""

    @property
    def starts(self) -> Tensor:
        """(N,) int64: where each completion begins in the flat tensors."""
        return torch.cumsum(self.lengths, 0) - self.lengths

    @property
    def sequence(self) -> Tensor:
        """(T,) int64: the completion each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def completion_ids(self, n: int) -> list[int]:
        """Token ids of completion `n`."""
        start = int(self.starts[n])
        return self.tokens[start : start + int(self.lengths[n])].tolist()
