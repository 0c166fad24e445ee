"""`python -m grpo_dist check`: everything about a run that can be found out beforehand, and all problems at once.

    python -m grpo_dist check --config configs/quickstart.yaml --ranks 8

and the same on the machines of the run:

    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 -m grpo_dist.train \
        --config FILE --dry_run

Options are those of a training. Nothing is loaded that a run would compute with, and nothing is left behind. The exit
status is 2 where there is any problem.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..preflight.look import check
from ..preflight.options import read_options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's own options; those of a run, `--config` first, are left to its parser."""
    parser.add_argument("--ranks", type=int, metavar="N", help="processes of the run (as many as there are GPUs, or 1)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Look, print, and return 2 where there is a problem. Raises ValueError."""
    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"--ranks: {options.ranks} given, expected at least 1")
    return check(read_options(rest), options.ranks)
