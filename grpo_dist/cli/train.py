"""`python -m grpo_dist train`: train in one process, on one GPU or the CPU.

    python -m grpo_dist train --config configs/quickstart.yaml

With several GPUs each one has a process:

    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 -m grpo_dist.train --config FILE

`python -m grpo_dist.train --help` lists the options of a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..config.parse import refuse_mistakes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add nothing: all options are those of a run."""


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train, and return the exit status."""
    refuse_mistakes(list(rest))

    # only now, since this imports torch
    from ..train import train
    from ..trainer.ending import main

    return main(train, list(rest))
