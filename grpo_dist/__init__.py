"""grpo_dist: GRPO under Accelerate and DeepSpeed, the same result however it is run."""

__version__ = "0.1.0"
