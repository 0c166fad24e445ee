"""The learning rate as a function of the step, so that it has no state to save. Pure."""

from __future__ import annotations

import math

from ..config.schema import OptimConfig


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Learning rate of step `step` (from 0) of `num_steps`: linear warm-up, then the schedule, which goes down to the
    share `min_lr_ratio` of the peak. `warmup_stable_decay` is constant until the last `decay_ratio` of the steps."""
    warmup_steps = optim.warmup_steps or math.ceil(optim.warmup_ratio * num_steps)
    if step < warmup_steps:
        return optim.learning_rate * (step + 1) / warmup_steps
    decay_from = warmup_steps
    if optim.scheduler == "warmup_stable_decay":
        decay_from = max(warmup_steps, num_steps - math.ceil(optim.decay_ratio * num_steps))
    progress = max(0.0, step - decay_from) / max(1, num_steps - decay_from)
    half_cosine = (1 + math.cos(math.pi * progress)) / 2
    share = {"linear": 1 - progress, "constant": 1.0}.get(optim.scheduler, half_cosine)
    return optim.learning_rate * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)
