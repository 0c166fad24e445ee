"""Rewards for length, in tokens of the completion (its end token included where the model wrote one).

- `length`: 1 at `target` tokens, falling linearly to 0 at `tolerance` tokens more or fewer, 0 beyond.
- `overlong`: the soft punishment of DAPO (Yu et al. 2025, eq. 13): 0 up to `max_length - buffer` tokens, falling
  linearly to -1 at `max_length`, -1 beyond. Set `max_length` to rollout.max_completion_length.
"""

from __future__ import annotations

from collections.abc import Sequence

from .placement import runs_in


@runs_in("worker", most_items=32)
class LengthReward:
    """Reward completions near a target length."""

    def __init__(self, target: int, tolerance: int) -> None:
        """Raises ValueError for a target below 0 or a tolerance below 1, in tokens."""
        if target < 0 or tolerance < 1:
            raise ValueError(f"target {target} and tolerance {tolerance} given, expected at least 0 and 1 tokens")
        self.target, self.tolerance = target, tolerance

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """Score completions by their number of tokens."""
        return [max(0.0, 1 - abs(len(ids) - self.target) / self.tolerance) for ids in completion_ids]


@runs_in("worker", most_items=32)
class OverlongReward:
    """Punish completions that come near the longest length, before the limit cuts them."""

    def __init__(self, max_length: int, buffer: int) -> None:
        """Raises ValueError unless 0 < buffer <= max_length, in tokens."""
        if not 0 < buffer <= max_length:
            raise ValueError(f"buffer {buffer} and max_length {max_length} given, expected 0 < buffer <= max_length")
        self.max_length, self.buffer = max_length, buffer

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """Score completions by their number of tokens; never above 0."""
        start = self.max_length - self.buffer
        return [-min(max((len(ids) - start) / self.buffer, 0.0), 1.0) for ids in completion_ids]
