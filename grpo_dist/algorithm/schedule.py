"""The learning rate as a function of the step, so that it has no state to save. Pure."""

from __future__ import annotations

import math

from ..config.schema import OptimConfig


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Learning rate of step `step` (from 0) of `num_steps`: linear warm-up, then the schedule down to 0."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    share = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[optim.scheduler]
    return optim.learning_rate * share
