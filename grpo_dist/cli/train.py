"""`python -m grpo_dist train`: train in one process, on one GPU or the CPU.

    python -m grpo_dist train --config configs/quickstart.yaml

With several GPUs each one has a process:

    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 -m grpo_dist.train --config FILE

`python -m grpo_dist.train --help` lists the options of a run.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path

from ..config.parse import checked
from ..config.schema import Config
from ..distributed.process import imports
from ..preflight.early import refuse_mistakes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add nothing: all options are those of a run."""


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train, and return the exit status."""
    refuse_mistakes(list(rest))

    with imports():
        from ..train import train
        from ..trainer.ending import main

    return main(train, list(rest))


def run_training(config: Config) -> Path:
    """Train in this process, which is one rank where a launcher has set that up, and return train.output_dir.

    The training goes on from a checkpoint as the command does, and a signal or train.max_time stops it with one. Raises
    ValueError for an option out of range and in another thread than the main one, and RuntimeError where the training
    fails, after the message that says why.
    """
    from ..train import train
    from ..trainer.ending import run as run_ranks

    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"run_training: called in the thread {threading.current_thread().name!r}, expected the main "
                         "thread, because only that receives the signals that stop a run: start a process for it, as "
                         "with multiprocessing's method 'spawn'")  # fmt: skip
    status = run_ranks(train, checked(config))
    if status:
        raise RuntimeError(f"the training ended with status {status}; the message before this says why")
    return Path(config.train.output_dir)
