"""`python -m grpo_dist evaluate`: evaluate a model on a data set in one process, on one GPU or the CPU.

    python -m grpo_dist evaluate --model runs/quickstart/final --config configs/quickstart.yaml --n 16

Prints pass@k, maj@k and mean@k with intervals, and saves every sample. With several GPUs each one has a process:

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 -m grpo_dist.evaluate --model …

Options that are not listed here are those of a training config.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..config import evaluation
from ..config.parse import parse_config as parse_config  # says that the verb takes a run's options
from ..distributed.process import imports
from ..text.plain import write_stage

add_options = evaluation.add_options


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Evaluate, and return the exit status. Raises ValueError."""
    config = evaluation.config_of(options, rest)

    with imports(write_stage):
        from ..evaluate import evaluate

    return evaluate(options, config)
