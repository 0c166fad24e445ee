"""`python -m grpo_dist completion SHELL`: print the script for shell completion of the command `grpo-dist`.

    eval "$(grpo-dist completion bash)"                                   in ~/.bashrc
    grpo-dist completion zsh > ~/.zfunc/_grpo-dist                        with ~/.zfunc in fpath before compinit
    grpo-dist completion fish > ~/.config/fish/completions/grpo-dist.fish

It completes verbs, their options, paths, and the dotted options of a run with their values.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import shtab

from ..config.checks import require
from ..config.names import group_type, option_types, presets
from .main import VERBS, make_parser

PROGRAM = "grpo-dist"
READERS = ("parse_config", "read_options", "refuse_mistakes")
"""Functions that a verb imports if it takes the options of a run."""
FILES = ("data.train_file", "data.eval_file", "model.name")
"""Options of a run that may be a path."""
PATHS = ("model", "data", "completions")
"""Options of a verb that may be a path, besides those whose type is one."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's argument."""
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print the script. Raises ValueError."""
    require(not rest, "arguments", list(rest), "a shell alone")
    print(script(options.shell))
    return 0


def script(shell: str) -> str:
    """Return the script for the shell."""
    parser = make_parser(VERBS)
    parser.prog = PROGRAM
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, verb in verbs.choices.items():
        verb.prog = f"{PROGRAM} {name}"
        verb.description = VERBS[name][1]
        for action in verb._actions:
            if action.type is Path or action.dest in PATHS:
                action.complete = shtab.FILE
        module = importlib.import_module(VERBS[name][0])
        if any(hasattr(module, reader) for reader in READERS):
            _add_run_options(verb)
    return shtab.complete(parser, shell)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run to complete their names and values. Another parser reads them."""
    parser.add_argument("--config").complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument("--preset", choices=presets())
    for name, hint in option_types().items():
        if group_type(hint) is None:
            option = parser.add_argument(f"--{name}", choices=_values(hint))
            if name in FILES:
                option.complete = shtab.FILE  # type: ignore[attr-defined]
            elif name == "train.output_dir":
                option.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


def _values(hint: Any) -> list[str] | None:
    """Return the values of an option, if there are few."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return ["true", "false"] if hint is bool else None
