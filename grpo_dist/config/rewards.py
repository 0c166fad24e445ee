"""The options of rewards: which functions, with which weights, and the pool of processes that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .checks import require

MOST_REWARD = 1e30
"""Largest magnitude of a reward and of a weight: the squares of much larger ones are infinite, and advantages would be
0."""


@dataclass
class RewardConfig:
    """One reward function."""

    name: str = "math"
    """A built-in reward (see docs/rewards.md), or `module:function` for one of your own."""
    weight: float = 1.0
    """Rewards are summed with these weights."""
    schedule: dict[int, float] | None = None
    """Factors of the weight by step, such as `{0: 1.0, 200: 0.0}`: linear between these steps, constant outside."""
    args: dict[str, Any] = field(default_factory=dict)
    """The reward's own arguments."""
    timeout_seconds: float | None = None
    """This reward's own limit in place of scoring.timeout_seconds."""
    environment: list[str] = field(default_factory=list)
    """Environment variables that this reward needs although their names look like secrets (a judge's API key). The
    reward then runs in workers of its own, and no other reward sees them."""

    def __post_init__(self) -> None:
        require(bool(self.name), "rewards.name", self.name, "a built-in reward or module:function")
        require(abs(self.weight) <= MOST_REWARD, "rewards.weight", self.weight, "a finite number of at most 1e30")
        require(self.timeout_seconds is None or self.timeout_seconds > 0, "rewards.timeout_seconds",
                self.timeout_seconds, "seconds above 0, or null")  # fmt: skip
        require(self.schedule is None or (bool(self.schedule) and min(self.schedule) >= 0), "rewards.schedule",
                self.schedule, "at least one step from 0 up with its factor, or null")  # fmt: skip

    @property
    def counts(self) -> bool:
        """Whether the weight is not 0 at some step."""
        return bool(self.weight) and (self.schedule is None or any(self.schedule.values()))

    def weight_at(self, step: int) -> float:
        """The weight at a step (from 0)."""
        if self.schedule is None:
            return self.weight
        points = sorted(self.schedule.items())
        after = next((n for n, (at, _) in enumerate(points) if at > step), len(points))
        if after in (0, len(points)):
            return self.weight * points[min(after, len(points) - 1)][1]
        (left, low), (right, high) = points[after - 1], points[after]
        return self.weight * (low + (high - low) * (step - left) / (right - left))


def require_rewards(rewards: Sequence[RewardConfig], num_steps: int) -> None:
    """Raise ValueError where there is no reward, or none that counts in one of the steps."""
    require(bool(rewards), "rewards", rewards, "at least one reward")
    require(any(reward.counts for reward in rewards), "rewards.weight", [reward.weight for reward in rewards],
            "one that counts: weight 0 is for metrics")  # fmt: skip
    begins = {0, *(step for reward in rewards for step in reward.schedule or ())}
    idle = [step for step in sorted(begins) if step < num_steps and not any(each.weight_at(step) for each in rewards)]
    require(not idle, "rewards.schedule", [reward.schedule for reward in rewards],
            f"a reward that counts in every step, but all weights are 0 in step {idle[0] if idle else 0}")  # fmt: skip


@dataclass
class ScoringConfig:
    """The pool of processes that runs the reward functions."""

    num_workers: int = 2
    """Worker processes on each rank."""
    timeout_seconds: float = 60.0
    """Time limit of a call, which has all completions of a prompt. A call that takes longer is killed; a completion
    that takes longer by itself counts as unscored (docs/rewards.md)."""
    error_budget: float = 0.1
    """Share of a step's completions that may stay unscored through failures; above it the run stops."""
    recycle_above_gib: float = 2.0
    """A worker that has more memory than this after a call is replaced by a new one, which bounds leaks."""
    memory_limit_gib: float = 8.0
    """Memory that a worker can allocate; above it a reward gets a MemoryError. Workers on a GPU have no limit."""

    def __post_init__(self) -> None:
        require(0 < self.recycle_above_gib <= self.memory_limit_gib, "scoring.recycle_above_gib",
                self.recycle_above_gib, f"above 0, up to memory_limit_gib = {self.memory_limit_gib}")  # fmt: skip
        require(self.num_workers >= 1, "scoring.num_workers", self.num_workers, "at least 1 process")
        require(self.timeout_seconds > 0, "scoring.timeout_seconds", self.timeout_seconds, "seconds above 0")
        require(0 <= self.error_budget <= 1, "scoring.error_budget", self.error_budget, "a share in [0, 1]")
