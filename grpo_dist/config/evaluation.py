"""The command line of an evaluation, without heavy imports."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .own_options import OwnOptions
from .parse import parse_config
from .schema import Config

_SUMMARY = ("Evaluate a model on a data set: unbiased pass@k, maj@k, mean reward, with intervals, on any number of "
            "ranks.")  # fmt: skip


def read_options(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Read the command line; what it does not name here are options of a training config."""
    parser = OwnOptions(prog="grpo_dist.evaluate", description=_SUMMARY)
    parser.add_argument("--model", required=True, help="a model's directory or hub id, or a toy's name")
    parser.add_argument("--data", help="in place of the config's data.eval_file")
    parser.add_argument("--n", type=int, default=16, help="samples a prompt (16)")
    parser.add_argument("--category", help="a column of the data: a table for each of its values")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="where samples and summary go")
    parser.add_argument("--compare", type=Path, metavar="OUTPUT", help="another evaluation's output, for a paired test")
    options, rest = parser.parse_known_args(arguments)
    if options.n < 1:
        parser.error(f"--n: {options.n} given, expected at least 1")
    if options.compare is not None and not list(options.compare.glob("samples_*.jsonl")):
        parser.error(f"--compare: {options.compare} holds no samples of an evaluation")
    config = parse_config([*rest, "--model.name", options.model])
    config.data.eval_file = options.data or config.data.eval_file
    if config.data.eval_file is None:
        parser.error("no data: give --data, or a config with data.eval_file")
    return options, config
