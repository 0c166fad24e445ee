"""`python -m grpo_dist check`: check a run before it starts, and report all problems at once.

    python -m grpo_dist check --config configs/quickstart.yaml --ranks 8

The same check on the machines of the run:

    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 -m grpo_dist.train \\
        --config FILE --dry_run

The options are those of a training. The check reads the headers of weight files and no weights, and leaves no files.
The exit status is 2 if there is a problem.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..config.mistakes import read_options
from ..preflight.look import check


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb. The parser of a run reads the others, such as `--config`."""
    parser.add_argument("--ranks", type=int, metavar="N", help="processes of the run (the number of GPUs, or 1)")
    parser.add_argument("--defaults", action="store_true", help="also list the options that are not given")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Check, print, and return 2 if there is a problem. Raises ValueError."""
    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"--ranks: {options.ranks} given, expected at least 1")
    return check(read_options(rest), options.ranks, with_defaults=options.defaults)
