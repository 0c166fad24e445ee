"""The command line of an evaluation, without heavy imports."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .checks import require
from .mistakes import COMMAND_LINE
from .mistakes import read_options as read_run_options
from .own_options import OwnOptions
from .parse import parse_config
from .places import model_place
from .schema import Config

_SUMMARY = ("Evaluate a model on a data set: unbiased pass@k, maj@k, mean reward, with intervals, on any number of "
            "ranks.")  # fmt: skip


def read_options(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Read the command line; what it does not name here are options of a training config."""
    parser = OwnOptions(prog="grpo_dist.evaluate", description=_SUMMARY)
    add_options(parser)
    options, rest = parser.parse_known_args(arguments)
    try:
        return options, config_of(options, rest)
    except ValueError as error:
        parser.error(str(error))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation that are no options of a training config."""
    parser.add_argument("--model", help="directory or hub id of a model or a PEFT adapter, or a toy's name")
    parser.add_argument("--data", help="in place of the config's data.eval_file")
    parser.add_argument("--n", type=int, default=16, help="samples a prompt (16)")
    parser.add_argument("--category", metavar="COLUMN", help="results for each value of a column, or COLUMN.KEY")
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation"), help="where samples and summary go (evaluation)"
    )
    parser.add_argument("--compare", type=Path, metavar="OUTPUT", help="another evaluation's output, for a paired test")


def config_of(options: argparse.Namespace, rest: Sequence[str]) -> Config:
    """The config of an evaluation, from its own options and those of a training config, whose rewards have the weights
    of the last step. Raises ValueError."""
    if options.model is None:
        raise ValueError("--model is missing: a model's directory or hub id, or a toy's name")
    model_place(options.model, "--model")
    require(options.n >= 1, "--n", options.n, "at least 1")
    if options.compare is not None and not list(options.compare.glob("samples_*.jsonl")):
        raise ValueError(f"--compare: {options.compare} holds no samples of an evaluation")
    config = parse_config([*rest, "--model.name", options.model])
    _refuse_other_models(rest)
    config.data.eval_file = options.data or config.data.eval_file
    if config.data.eval_file is None:
        raise ValueError("no data: give --data, or a config with data.eval_file")
    weights = config.weights_after(config.train.num_train_steps)
    config.rewards = [replace(reward, weight=weight, schedule=None)
                      for reward, weight in zip(config.rewards, weights, strict=True)]  # fmt: skip
    return config


def _refuse_other_models(words: Sequence[str]) -> None:
    """Raise ValueError where the command line names another model than --model, or an adapter for it.

    Those of a training's config file are where it began, and not what is evaluated.
    """
    if not any(word.startswith(("--lora", "--model.name")) for word in words):
        return  # reading all options again takes half a second
    for given in read_run_options(words).given.values():
        if given.source != COMMAND_LINE:
            continue
        if given.key == "model.name":
            raise ValueError(f"--{given}, beside --model: expected one of them, --model")
        names_adapter = given.key == "lora.init_from" or (given.key == "lora" and "init_from" in str(given.value))
        if names_adapter and given.value != "null":
            raise ValueError(f"--{given}, which an evaluation does not read: give the adapter as --model, with its "
                             "base as base_model_name_or_path in its adapter_config.json")  # fmt: skip
